"""The same few validation images at every evaluation: true objects on the left, predicted ones on the right."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

from pipelines.load.sample import read_image
from pipelines.shards.dataset import Dataset

NUM_IMAGES = 4
_MIN_SCORE = 0.5
_MAX_SIDE_PX = 480
_GAP_PX = 6
_COLOURS = (
    (230, 57, 70),
    (42, 157, 143),
    (69, 123, 255),
    (244, 162, 97),
    (155, 93, 229),
    (0, 187, 249),
    (254, 228, 64),
)

Pixels = NDArray[np.uint8]


def comparison(dataset: Dataset, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG of the dataset's first images, one a row, as `results` (by kind, COCO) and the annotations have them."""
    names = {category.id: category.name for category in dataset.categories}
    kind = "segm" if "segm" in results else "keypoints" if "keypoints" in results else "bbox"
    rows = []
    for number in dataset.rows()[:NUM_IMAGES]:
        row = dataset.row(number)
        pixels = read_image(row, dataset).permute(1, 2, 0).numpy()
        predicted = [
            r for r in results[kind] if r["image_id"] == row.image_id and r["score"] >= _MIN_SCORE
        ]
        truth = [a.json() for a in dataset.annotations(row.image_id) if not a.iscrowd]
        sides = [
            _drawn(pixels, truth, names),
            _drawn(pixels, sorted(predicted, key=lambda r: r["score"]), names),
        ]
        rows.append(np.concatenate([sides[0], _gap(sides[0].shape[0], _GAP_PX), sides[1]], axis=1))
    if not rows:
        rows = [_gap(16, 16)]
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, ((0, _GAP_PX), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(padded, axis=0)).save(sink, "png")
    return sink.getvalue()


def _drawn(
    pixels: Pixels, objects: Iterable[Mapping[str, Any]], names: Mapping[int, str]
) -> Pixels:
    """`pixels` (H, W, 3), at most `_MAX_SIDE_PX` on its long side, with the objects' masks, boxes or keypoints."""
    height, width = pixels.shape[:2]
    canvas = pixels.astype(np.float32)
    labels = []
    for thing in objects:
        colour = _COLOURS[int(thing["category_id"]) % len(_COLOURS)]
        if thing.get("segmentation"):
            mask = _mask(thing["segmentation"], height, width)
            canvas[mask] = 0.5 * canvas[mask] + 0.5 * np.asarray(colour, np.float32)
        labels.append((thing, colour))
    scale = min(1.0, _MAX_SIDE_PX / max(height, width))
    image = Image.fromarray(canvas.astype(np.uint8)).resize(
        (max(round(width * scale), 1), max(round(height * scale), 1))
    )
    draw = ImageDraw.Draw(image)
    for thing, colour in labels:
        x, y, w, h = (value * scale for value in _box(thing))
        draw.rectangle((x, y, x + w, y + h), outline=colour)
        score = f" {thing['score']:.2f}" if "score" in thing else ""
        draw.text(
            (x + 2, y + 1), f"{names.get(int(thing['category_id']), '?')}{score}", fill=colour
        )
        for px, py, seen in np.asarray(thing.get("keypoints", ()), np.float64).reshape(-1, 3):
            if seen > 0:
                draw.ellipse(
                    (px * scale - 2, py * scale - 2, px * scale + 2, py * scale + 2), fill=colour
                )
    return np.asarray(image)


def _mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Any of COCO's forms: polygons, compressed or uncompressed run lengths."""
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = rle_tools.frPyObjects(segmentation, height, width)
    if isinstance(segmentation, list):
        segmentation = rle_tools.merge(segmentation)
    return np.asarray(rle_tools.decode(segmentation), dtype=bool)


def _box(thing: Mapping[str, Any]) -> Sequence[float]:
    if "bbox" in thing:
        return [float(value) for value in thing["bbox"]]
    if "segmentation" in thing:
        return [float(value) for value in rle_tools.toBbox(thing["segmentation"])]
    points = np.asarray(thing["keypoints"], np.float64).reshape(-1, 3)[:, :2]
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]


def _gap(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 255, np.uint8)
