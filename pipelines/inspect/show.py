"""Counts of a packed dataset, and a picture of some of its samples with what is annotated on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as rle_tools

from pipelines.coco.checks import check_file_to_write, shortened
from pipelines.load.sample import read_image
from pipelines.shards.dataset import Dataset
from pipelines.shards.keyed_random import shuffled
from pipelines.shards.schema import coco_rle

_COLOURS = (
    (230, 60, 60),
    (60, 160, 240),
    (70, 200, 90),
    (240, 180, 40),
    (190, 90, 230),
    (60, 210, 200),
)
TILE_PX = 320


def summary(dataset: Dataset) -> dict[str, Any]:
    """Counts in all and for each category."""
    index, manifest = dataset.index, dataset.manifest
    per_label = np.zeros(len(manifest.categories), np.int64)
    crowds = 0
    for shard in range(index.num_shards):
        labels, flags = index.annotation_columns(shard)
        per_label += np.bincount(labels, minlength=len(per_label))
        crowds += int((flags & 1).sum())
    return {
        "images": manifest.num_images,
        "annotations": manifest.num_annotations,
        "crowds": crowds,
        "shards": manifest.num_shards,
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "skipped": manifest.num_skipped,
        "masks": manifest.has_masks,
        "keypoints": manifest.num_keypoints,
        "manifest": manifest.hash,
        "categories": [
            {"id": c["id"], "name": c["name"], "annotations": int(n)}
            for c, n in zip(manifest.categories, per_label, strict=True)
        ],
    }


def draw_samples(dataset: Dataset, out: Path, *, count: int, seed: int, masks: bool) -> list[int]:
    """Writes a PNG of `count` images in a grid; returns their ids. Raises ValueError if nothing can be drawn there."""
    check_file_to_write(out)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed is {shortened(seed)}; give a whole number of 64 bits")
    rows = shuffled(dataset.manifest.num_images, seed)[:count]
    tiles, ids = [], []
    for number in rows:
        row = dataset.row(int(number))
        picture = Image.fromarray(read_image(row, dataset).permute(1, 2, 0).numpy())
        names = {int(c["id"]): str(c["name"]) for c in dataset.categories}
        tiles.append(annotated(picture, dataset.annotations(row.image_id), names, masks))
        ids.append(row.image_id)
    columns = max(1, int(np.ceil(np.sqrt(len(tiles)))))
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE_PX, lines * TILE_PX), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * TILE_PX, place // columns * TILE_PX))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return ids


def annotated(
    picture: Image.Image, annotations: list[dict[str, Any]], names: dict[int, str], masks: bool
) -> Image.Image:
    """The picture at the size of a tile, with boxes and names, keypoints, masks if asked for; crowds are grey."""
    pixels = np.asarray(picture, np.float64).copy()
    colours = [
        (128, 128, 128) if a["iscrowd"] else _COLOURS[n % len(_COLOURS)]
        for n, a in enumerate(annotations)
    ]
    if masks:
        for annotation, colour in zip(annotations, colours, strict=True):
            if annotation.get("segmentation"):
                inside = _mask(annotation, *pixels.shape[:2])
                pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(colour)
    scale = (TILE_PX - 4) / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = Image.fromarray(pixels.round().astype(np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(picture)
    for annotation, colour in zip(annotations, colours, strict=True):
        x, y, w, h = (scale * v for v in annotation["bbox"])
        pen.rectangle((x, y, x + w, y + h), outline=colour, width=2)
        pen.text((x + 3, y + 2), names[annotation["category_id"]], fill="white")
        points = annotation.get("keypoints", [])
        for px, py, visibility in zip(points[::3], points[1::3], points[2::3], strict=True):
            if visibility > 0:
                spot = (
                    scale * (px + 0.5) - 2,
                    scale * (py + 0.5) - 2,
                    scale * (px + 0.5) + 3,
                    scale * (py + 0.5) + 3,
                )
                pen.ellipse(spot, fill=colour if visibility == 2 else None, outline="white")
    return picture


def _mask(annotation: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    return np.asarray(rle_tools.decode(coco_rle(annotation["segmentation"], height, width)), bool)
