"""Outlines of scenes, inside the circle of radius 1. Each has a neighbour that it is mistaken for.

The pairs: person and lamp, ellipse and drop, crescent and hook, star and burst, cross and tee,
arrow and fork. Half of them are thin or concave.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pipelines.pack.placed import Points

Outline = list[Points]  # its polygons


def _ring(radii: Points, count: int) -> Points:
    """Corners at equal angles, the first one at the top."""
    angles = np.arange(count) * 2 * math.pi / count - math.pi / 2
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _spiked(points: int, notch: float) -> Outline:
    return [_ring(np.where(np.arange(2 * points) % 2 == 0, 1.0, notch), 2 * points)]


def _lamp() -> Outline:
    """A shade on a thin pole, and a foot."""
    shade = np.array([[-0.24, -0.95], [0.24, -0.95], [0.42, -0.3], [-0.42, -0.3]])
    pole = np.array([[-0.1, -0.31], [0.1, -0.31], [0.1, 0.76], [-0.1, 0.76]])
    foot = np.array([[-0.36, 0.75], [0.36, 0.75], [0.36, 0.95], [-0.36, 0.95]])
    return [shade, pole, foot]


def _ellipse() -> Outline:
    return [_ring(np.ones(32), 32) * [0.66, 0.95]]


def _drop() -> Outline:
    """Round below, pointed above."""
    angles = np.linspace(0, 2 * math.pi, 33)[:-1]
    width = 0.66 * np.sin(angles) * np.sin(angles / 2) ** 1.2
    return [np.stack([width, -0.95 * np.cos(angles)], 1)]


def _crescent() -> Outline:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 25)
    inner = np.linspace(1.7 * math.pi, 0.3 * math.pi, 21)
    back = np.stack([np.cos(outer), np.sin(outer)], 1) * 0.95
    front = np.stack([0.66 * np.cos(inner) + 0.28, 0.66 * np.sin(inner)], 1)
    return [np.concatenate([back, front])]


def _hook() -> Outline:
    """A straight back that turns into half a ring below."""
    angles = np.linspace(0, math.pi, 15)
    outer = np.stack([0.6 * np.cos(angles), 0.35 + 0.6 * np.sin(angles)], 1)
    inner = np.stack([0.2 * np.cos(angles[::-1]), 0.35 + 0.2 * np.sin(angles[::-1])], 1)
    return [np.concatenate([outer, [[-0.6, -0.95], [-0.2, -0.95]], inner])]


def _cross() -> Outline:
    a, b = 0.26, 0.22  # half widths; the beam lies above the middle
    return [
        np.array([
            [a, -0.35 - b], [0.75, -0.35 - b], [0.75, -0.35 + b], [a, -0.35 + b], [a, 0.95],
            [-a, 0.95], [-a, -0.35 + b], [-0.75, -0.35 + b], [-0.75, -0.35 - b], [-a, -0.35 - b],
            [-a, -0.95], [a, -0.95],
        ])
    ]  # fmt: skip


def _tee() -> Outline:
    a = 0.26
    return [
        np.array([
            [-0.75, -0.95], [0.75, -0.95], [0.75, -0.5], [a, -0.5], [a, 0.95], [-a, 0.95],
            [-a, -0.5], [-0.75, -0.5],
        ])
    ]  # fmt: skip


def _arrow() -> Outline:
    a = 0.24
    return [
        np.array([
            [0, -0.98], [0.62, -0.2], [a, -0.2], [a, 0.95], [-a, 0.95], [-a, -0.2], [-0.62, -0.2],
        ])
    ]  # fmt: skip


def _fork() -> Outline:
    """Three tines on a handle."""
    a, t = 0.2, 0.13
    return [
        np.array([
            [-0.58, -0.95], [-0.58 + 2 * t, -0.95], [-0.58 + 2 * t, -0.3], [-t, -0.3], [-t, -0.95],
            [t, -0.95], [t, -0.3], [0.58 - 2 * t, -0.3], [0.58 - 2 * t, -0.95], [0.58, -0.95],
            [0.58, 0.1], [a, 0.1], [a, 0.95], [-a, 0.95], [-a, 0.1], [-0.58, 0.1],
        ])
    ]  # fmt: skip


# The person has joints and keypoints, so it is drawn apart, as category 0.
# Neighbours of a pair stand together, so that the first six names are three pairs.
OUTLINES: dict[str, Callable[[], Outline]] = {
    "lamp": _lamp,
    "ellipse": _ellipse,
    "drop": _drop,
    "star": lambda: _spiked(5, 0.45),
    "burst": lambda: _spiked(7, 0.6),
    "cross": _cross,
    "tee": _tee,
    "arrow": _arrow,
    "fork": _fork,
    "crescent": _crescent,
    "hook": _hook,
}
