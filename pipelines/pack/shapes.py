"""The demo's images: shapes of four categories, each with a hue of its own, at every angle."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipelines.pack.person import person
from pipelines.pack.placed import (
    MIN_PIXELS,
    Canvas,
    Drawn,
    Mask,
    Placed,
    Points,
    crowd,
    polygon_mask,
    rounded,
)

CROWD_RATE = 0.05
MIN_VISIBLE = 0.55  # of an object's pixels; no new object may hide more of another one


def star() -> Points:
    """Five points, deep notches."""
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def ellipse() -> Points:
    """A flattened disc."""
    angles = np.linspace(0, 2 * math.pi, 33)[:-1]
    return np.stack([0.95 * np.cos(angles), 0.62 * np.sin(angles)], 1)


def cross() -> Points:
    """A plus sign with arms of different lengths."""
    a = 0.36
    long, short = 0.95, 0.8
    return np.array(
        [
            [a, -a], [long, -a], [long, a], [a, a], [a, short], [-a, short],
            [-a, a], [-long, a], [-long, -a], [-a, -a], [-a, -short], [a, -short],
        ]
    )  # fmt: skip


def triangle() -> Points:
    """Three equal sides."""
    angles = np.arange(3) * 2 * math.pi / 3 - math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1)


SHAPES: dict[str, Callable[[], Points]] = {
    "star": star,
    "ellipse": ellipse,
    "cross": cross,
    "triangle": triangle,
}


def draw_shapes(rng: np.random.Generator, size: int, *, keypoints: bool) -> Drawn:
    """uint8 (H, W, 3) with `size` as its long side, and its objects."""
    short = round(size * rng.choice([0.75, 0.85, 1.0]))
    height, width = (size, short) if rng.random() < 0.5 else (short, size)
    image = _ground(rng, height, width)
    objects: list[Placed] = []
    # The crowd comes first, so that it lies behind everything.
    if rng.random() < CROWD_RATE:
        category = int(rng.integers(1, 4))  # not the first, which may be the person
        many = crowd(rng, category, [list(SHAPES.values())[category]()], height, width)
        if many.whole >= MIN_PIXELS:
            _paint(rng, image, many.mask, category, 0.0)
            objects.append(many)
    wanted = int(rng.integers(2, 6))
    for _ in range(wanted * 3):  # an attempt may find no room
        if sum(not placed.crowd for placed in objects) >= wanted:
            break
        _try_object(rng, image, objects, keypoints)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), objects


def _try_object(
    rng: np.random.Generator, image: Canvas, objects: list[Placed], keypoints: bool
) -> None:
    """Draws an object over the others unless it would hide too much of one."""
    height, width = image.shape[:2]
    category = int(rng.integers(4))
    radius = max(height, width) * math.exp(rng.uniform(math.log(0.14), math.log(0.34)))
    centre = np.array(
        [
            rng.uniform(0.5 * radius, width - 0.5 * radius),
            rng.uniform(0.5 * radius, height - 0.5 * radius),
        ]
    )
    points: Points | None = None
    if keypoints and category == 0:
        radius = max(radius, 0.16 * max(height, width))  # a person's limbs are thin
        outlines, points = person(rng)
        turn = rng.uniform(-0.2, 0.2)
    else:
        outlines, turn = [list(SHAPES.values())[category]()], rng.uniform(0, 2 * math.pi)
    stretch = np.array([1.0, rng.uniform(0.75, 1.0)])
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    polygons = [
        rounded(outline * stretch @ rotation * radius + centre, width, height)
        for outline in outlines
    ]
    mask = polygon_mask(polygons, height, width)
    if points is not None:
        points = points * stretch @ rotation * radius + centre
    # Most of every object stays visible.
    if mask.sum() < MIN_PIXELS or any(
        (p.mask & ~mask).sum() < MIN_VISIBLE * p.whole for p in objects
    ):
        return
    _paint(rng, image, mask, category, turn)
    objects[:] = [replace(other, mask=other.mask & ~mask) for other in objects]
    objects.append(Placed(category, polygons, mask, int(mask.sum()), keypoints=points))


# --- appearance -----------------------------------------------------------------------------------

_HUES = (0.02, 0.14, 0.36, 0.62)  # of the four categories: red, yellow, green, blue


def _ground(rng: np.random.Generator, height: int, width: int) -> Canvas:
    """Low-saturation noise at three scales and a gradient."""
    ground: Canvas = np.full((height, width, 3), rng.uniform(0.25, 0.75)) + rng.normal(0, 0.04, 3)
    for cells, strength in ((3, 0.14), (9, 0.1), (30, 0.06)):
        coarse = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(
            0, strength * 0.3, (cells, cells, 3)
        )
        ground += enlarge(coarse, height, width)
    grain: Canvas = rng.normal(0, 0.03, (height, width, 1))
    return ground + grain


def enlarge(coarse: Canvas, height: int, width: int) -> Canvas:
    """Bilinear, corners at corners."""
    rows, columns = (np.linspace(0, len(coarse) - 1.001, n) for n in (height, width))
    y, x = rows.astype(int), columns.astype(int)
    fy, fx = (rows - y)[:, None, None], (columns - x)[None, :, None]
    top = coarse[y][:, x] * (1 - fx) + coarse[y][:, x + 1] * fx
    bottom = coarse[y + 1][:, x] * (1 - fx) + coarse[y + 1][:, x + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy)


def _paint(
    rng: np.random.Generator,
    image: Canvas,
    mask: Mask,
    category: int,
    turn: float,
) -> None:
    """Fills the mask with its category's hue, striped, in a brightness of its own."""
    hue = (_HUES[category] + rng.normal(0, 0.025)) % 1
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.95)))
    y, x = np.nonzero(mask)
    waves = np.sin(
        (x * math.cos(turn) + y * math.sin(turn)) * rng.uniform(0.4, 1.2) + rng.uniform(0, 6)
    )
    shade = 1 + 0.12 * waves + rng.normal(0, 0.04, len(x))
    image[mask] = colour * shade[:, None]
