"""Few shapes for all batches of a run: each global batch is padded to the smallest that holds it.

A compiled step and a CUDA graph are of one shape, so what counts is how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# An estimate: so many objects cost as much again as the pixels. Anchors are matched with each.
_OBJECTS_LIKE_THE_PIXELS = 512


class Canvas(NamedTuple):
    """What the batches of one shape share: pixels, and slots for objects."""

    height: int
    width: int
    objects: int


def smallest_holding(canvases: Sequence[Canvas], needed: Canvas) -> Canvas:
    """The cheapest canvas that holds `needed`; `needed` itself if none does."""
    holding = [canvas for canvas in canvases if _holds(canvas, needed)]
    return min(holding, key=_cost, default=needed)


def chosen_canvases(needed: Sequence[Canvas], most: int) -> tuple[Canvas, ...]:
    """At most `most` canvases that hold all of `needed`, which lists one for each batch.

    The first holds every batch. Then comes, again and again, the one that saves most.
    """
    candidates = sorted(set(needed))
    sizes = np.array(needed)
    largest = Canvas(*(int(side) for side in sizes.max(axis=0)))
    chosen = [largest]
    costs = np.full(len(needed), _cost(largest))  # of each batch on the canvases so far
    offers = np.array([_offered(candidate, sizes) for candidate in candidates])
    while len(chosen) < most:
        saved = (costs - np.minimum(offers, costs)).sum(axis=1)
        best = int(saved.argmax())
        if saved[best] <= 0:
            break
        chosen.append(candidates[best])
        costs = np.minimum(offers[best], costs)
    return tuple(sorted(chosen))


def _offered(canvas: Canvas, sizes_N3: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each batch costs on the canvas, infinity where it does not fit."""
    return np.where((sizes_N3 <= np.array(canvas)).all(axis=1), _cost(canvas), np.inf)


def _holds(canvas: Canvas, needed: Canvas) -> bool:
    return all(side >= wanted for side, wanted in zip(canvas, needed, strict=True))


def _cost(canvas: Canvas) -> float:
    return canvas.height * canvas.width * (1 + canvas.objects / _OBJECTS_LIKE_THE_PIXELS)
