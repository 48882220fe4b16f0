"""Small COCO datasets on disk, and packing them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from pipelines.pack.pack import Packed, PackOptions, pack
from pipelines.shards.dataset import Dataset, open_dataset

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def box_annotation(id: int, image_id: int = 1, **fields: Any) -> dict[str, Any]:
    """A square of 10 x 10 px at (5, 5)."""
    square = [5, 5, 15, 5, 15, 15, 5, 15]
    record = {
        "id": id,
        "image_id": image_id,
        "category_id": 3,
        "bbox": [5, 5, 10, 10],
        "area": 100,
        "iscrowd": 0,
    }
    return record | {"segmentation": [square]} | fields


def rle_of(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Any COCO segmentation as compressed RLE, by pycocotools alone."""
    coco = COCO()
    coco.imgs = {1: {"height": height, "width": width}}
    return coco.annToRLE({"image_id": 1, "segmentation": segmentation})


def noise_image(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def write_coco(
    folder: Path,
    annotations: Sequence[Any] = (),
    *,
    num_images: int = 1,
    images: Sequence[Any] | None = None,
    categories: Sequence[Mapping[str, Any]] = CATEGORIES,
    name: str = "instances.json",
) -> Path:
    """Writes `num_images` JPEGs of 40 x 30 px to folder/images, with ids from 1.

    Returns the annotation file.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = list(images) if images is not None else []
    for number in range(0 if images is not None else num_images):
        noise_image(seed=number).save(folder / "images" / f"{number + 1}.jpg")
        records.append(
            {"id": number + 1, "file_name": f"{number + 1}.jpg", "width": 40, "height": 30}
        )
    path = folder / name
    coco = {"images": records, "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(coco))
    return path


def pack_folder(folder: Path, *files: Path, **options: Any) -> Packed:
    """Packs into folder/packed."""
    return pack(
        list(files) or [folder / "instances.json"],
        str(folder / "images"),
        str(folder / "packed"),
        PackOptions(**options),
    )


def packed_coco(folder: Path, annotations: Sequence[Any] = (), **fields: Any) -> Dataset:
    write_coco(folder, annotations, **fields)
    pack_folder(folder)
    return open_dataset(str(folder / "packed"))
