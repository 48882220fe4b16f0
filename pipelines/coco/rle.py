"""Masks by run lengths, as pycocotools reads and writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools

from pipelines.coco.records import JsonValue, Polygons, Rle


def compressed(segmentation: Polygons | Rle, height: int, width: int) -> Rle:
    """The same mask with pycocotools' text as counts. Several polygons become their union."""
    # Always through pycocotools: its rule decides which pixels lie inside a polygon.
    if isinstance(segmentation, Rle):
        if isinstance(segmentation.counts, str):
            return segmentation
        coded = rle_tools.frPyObjects(segmentation.json(), height, width)
    else:
        coded = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    return Rle(height, width, coded["counts"].decode())


def decoded(segmentation: Polygons | Rle, height: int, width: int) -> NDArray[np.bool_]:
    """The mask as booleans (height, width)."""
    return np.asarray(rle_tools.decode(compressed(segmentation, height, width).json()), bool)


def mask_of(segmentation: JsonValue, height: int, width: int) -> NDArray[np.bool_]:
    """The mask of any of COCO's forms: polygons, compressed or uncompressed run lengths."""
    coded: Any = segmentation
    if isinstance(coded, list) or isinstance(coded["counts"], list):
        coded = rle_tools.frPyObjects(coded, height, width)
    if isinstance(coded, list):  # several polygons are one object
        coded = rle_tools.merge(coded)
    return np.asarray(rle_tools.decode(coded), bool)


def run_lengths(text: str) -> list[int] | None:
    """The numbers in pycocotools' compressed counts (maskApi.c, rleFrString), None if it is none.

    A character holds six bits, counted from 48: five bits of the number, lowest first, and one
    that says that the number goes on. From the fourth run on, a number is the difference to the
    run before the last.
    """
    # In Python, because pycocotools' own reader trusts the text and may read past its end.
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # the sign bit of the last five
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs
