"""Counts of a packed dataset, and a picture of some of its samples with their annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from contract.words import shortened
from pipelines.coco.checks import check_file_to_write, is_int
from pipelines.coco.records import CocoAnnotation
from pipelines.coco.rle import decoded
from pipelines.shards import schema
from pipelines.shards.dataset import Dataset
from pipelines.shards.keyed_random import shuffled

Colour = tuple[int, int, int]
TILE_PX = 320  # side of one sample in the picture
_CROWD_COLOUR = (128, 128, 128)
_COLOURS = (
    (230, 60, 60),
    (60, 160, 240),
    (70, 200, 90),
    (240, 180, 40),
    (190, 90, 230),
    (60, 210, 200),
)


@dataclass(frozen=True)
class CategoryCount:
    """How many annotations a category has."""

    id: int
    name: str
    annotations: int


@dataclass(frozen=True)
class Summary:
    """Counts of a packed dataset. keypoints: types of the category that has most."""

    images: int
    annotations: int
    crowds: int
    shards: int
    bytes: int
    skipped: int
    masks: bool
    keypoints: int
    manifest: str
    categories: tuple[CategoryCount, ...]


def summary(dataset: Dataset) -> Summary:
    """Counts in all and for each category, from the manifest and the index alone."""
    index, manifest = dataset.index, dataset.manifest
    per_label = np.zeros(len(manifest.categories), np.int64)
    crowds = 0
    for shard in range(index.num_shards):
        labels, flags = index.annotation_columns(shard)
        per_label += np.bincount(labels, minlength=len(per_label))
        crowds += int((flags & schema.CROWD).astype(bool).sum())
    counts = zip(manifest.coco_categories, per_label.tolist(), strict=True)
    return Summary(
        images=manifest.num_images,
        annotations=manifest.num_annotations,
        crowds=crowds,
        shards=manifest.num_shards,
        bytes=sum(entry.bytes for entry in manifest.shards),
        skipped=manifest.num_skipped,
        masks=manifest.has_masks,
        keypoints=manifest.num_keypoints,
        manifest=manifest.hash,
        categories=tuple(CategoryCount(c.id, c.name, count) for c, count in counts),
    )


def draw_samples(dataset: Dataset, out: Path, *, count: int, seed: int, masks: bool) -> list[int]:
    """Writes a PNG of `count` images in a grid; returns their ids.

    Raises ValueError if nothing can be drawn there.
    """
    from pipelines.load.sample import read_image  # imports torch, and counting needs none

    check_file_to_write(out)
    if not is_int(seed):
        raise ValueError(f"--seed is {shortened(seed)}; give a whole number of 64 bits")
    rows = shuffled(dataset.manifest.num_images, seed)[:count]
    names = {category.id: category.name for category in dataset.categories}
    tiles, ids = [], []
    for number in rows:
        row = dataset.row(int(number))
        picture = Image.fromarray(read_image(row, dataset).permute(1, 2, 0).numpy())
        tiles.append(annotated(picture, dataset.annotations(row.image_id), names, masks))
        ids.append(row.image_id)
    # As square as it goes.
    columns = max(1, int(np.ceil(np.sqrt(len(tiles)))))
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE_PX, lines * TILE_PX), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * TILE_PX, place // columns * TILE_PX))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return ids


def annotated(
    picture: Image.Image, annotations: Sequence[CocoAnnotation], names: dict[int, str], masks: bool
) -> Image.Image:
    """The picture at the size of a tile, with boxes, names and keypoints, and masks if wanted.

    Crowds are grey.
    """
    colours = [
        _CROWD_COLOUR if annotation.iscrowd else _COLOURS[number % len(_COLOURS)]
        for number, annotation in enumerate(annotations)
    ]
    objects = list(zip(annotations, colours, strict=True))
    if masks:
        picture = _with_masks(picture, objects)
    scale = (TILE_PX - 4) / max(picture.size)  # a gap of 4 px tells neighbours apart
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for annotation, colour in objects:
        x, y, w, h = (scale * v for v in annotation.bbox)
        pen.rectangle((x, y, x + w, y + h), outline=colour, width=2)
        pen.text((x + 3, y + 2), names[annotation.category_id], fill="white")
        points = annotation.keypoints
        for px, py, visibility in zip(points[::3], points[1::3], points[2::3], strict=True):
            if visibility > 0:
                # COCO's keypoints are pixel indices; a pixel's centre is half a pixel further.
                cx, cy = scale * (px + 0.5), scale * (py + 0.5)
                fill = colour if visibility == 2 else None  # a hidden point is an empty circle
                pen.ellipse((cx - 2, cy - 2, cx + 3, cy + 3), fill=fill, outline="white")
    return picture


def _with_masks(
    picture: Image.Image, objects: Sequence[tuple[CocoAnnotation, Colour]]
) -> Image.Image:
    """Masks are drawn at the size of the file, half transparent, before the picture is scaled."""
    pixels = np.asarray(picture, np.float64).copy()
    for annotation, colour in objects:
        if annotation.segmentation:
            inside = decoded(annotation.segmentation, picture.height, picture.width)
            pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(colour)
    return Image.fromarray(pixels.round().astype(np.uint8))
