"""A synthetic COCO dataset: shapes of four categories on textured ground, at every angle.

Objects overlap. A whole object is annotated by polygons, a partly hidden one by the RLE of what can
be seen. One image in twenty has a crowd. The same arguments give the same bytes (with the same
Pillow).
"""

from __future__ import annotations

import colorsys
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle_tools

from contract.words import shortened
from pipelines.coco.records import CocoImage, JsonObject, Rle
from pipelines.pack.shapes import COCO_KEYPOINTS, COCO_SKELETON, SHAPES, Points, person
from pipelines.progress import Progress, silent

SETTINGS_NAME = "synth.json"
VAL_PART = 5  # one image in so many is for validation
CROWD_RATE = 0.05
MIN_VISIBLE = 0.55  # of an object's pixels; no new object may hide more of another one
MIN_PIXELS = 24  # of an object when it is placed
MAX_SIZE = 4096  # px; drawing takes about 200 bytes a pixel
VERSION = 2  # a change of what is drawn gets a new number, so that no old dataset passes for it


@dataclass(frozen=True)
class SynthSettings:
    """What the bytes of a synthetic dataset depend on. OUT/synth.json holds it."""

    version: int
    train: int
    val: int
    size: int
    seed: int
    keypoints: bool

    def text(self) -> str:
        """The content of the note in OUT, whose bytes tell one dataset from another."""
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True)
class Synthesised:
    """What `synthesise` did. unchanged: the same dataset was there already."""

    settings: SynthSettings
    unchanged: bool


@dataclass(frozen=True)
class _Placed:
    """An object on the image. mask: what can be seen of it, (H, W)."""

    category: int
    polygons: list[Points]
    mask: NDArray[np.bool_]
    crowd: bool
    keypoints: Points | None


def synthesise(
    out: Path,
    *,
    num_images: int,
    size: int,
    seed: int,
    keypoints: bool = False,
    progress: Progress = silent,
) -> Synthesised:
    """Writes `num_images` in all, a fifth of them (at least one) for validation.

    Layout: annotations/instances_{train,val}.json and images/{train,val}/*.jpg; with keypoints
    also annotations/person_keypoints_{train,val}.json, the persons alone. Raises ValueError if
    `out` holds another dataset.
    """
    _check_arguments(out, num_images, size, seed)
    num_val = max(1, num_images // VAL_PART)
    settings = SynthSettings(VERSION, num_images - num_val, num_val, size, seed, keypoints)
    note = out / SETTINGS_NAME
    if note.exists():
        present = note.read_text(errors="replace")
        if present != settings.text():
            raise ValueError(
                f"{out}: holds another synthetic dataset ({present[:200].strip()}); choose another "
                "OUT"
            )
        return Synthesised(settings, unchanged=True)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    drawn = 0
    for number, (split, count) in enumerate((("train", settings.train), ("val", settings.val))):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        images: list[JsonObject] = []
        annotations: list[JsonObject] = []
        for k in range(count):
            image_id = number * 1_000_000 + k + 1  # ids of the splits never meet, as in COCO
            # Keyed by the image alone: it stays the same when the dataset grows.
            rng = np.random.default_rng([seed, number, k])
            pixels, objects = draw_image(rng, size, keypoints)
            height, width = pixels.shape[:2]
            image = CocoImage(image_id, f"{image_id:07d}.jpg", width, height)
            Image.fromarray(pixels).save(out / "images" / split / image.file_name, quality=92)
            images.append(image.json())
            annotations += [
                _annotation(placed, annotation_id, image_id)
                for annotation_id, placed in enumerate(objects, len(annotations) + 1)
            ]
            drawn += 1
            progress(drawn, num_images)
        _write_annotations(out / "annotations", split, settings, images, annotations)
    _write(note, settings.text())  # last: without it the dataset is not finished
    return Synthesised(settings, unchanged=False)


def _check_arguments(out: Path, num_images: int, size: int, seed: int) -> None:
    if num_images < 2:
        raise ValueError(
            f"--images is {num_images}; give at least 2, one to train on and one to validate on"
        )
    if not 32 <= size <= MAX_SIZE:
        raise ValueError(
            f"--size is {shortened(size)}; give 32 to {MAX_SIZE} px: objects need room, pixels "
            "memory"
        )
    if seed < 0:
        raise ValueError(f"--seed is {seed}; give 0 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; OUT must be a folder, new or empty")


def _write_annotations(
    folder: Path,
    split: str,
    settings: SynthSettings,
    images: Sequence[JsonObject],
    annotations: Sequence[JsonObject],
) -> None:
    """Writes instances_SPLIT.json, and person_keypoints_SPLIT.json where there are keypoints."""
    described = categories(settings.keypoints)
    coco: JsonObject = {
        "info": {"description": f"synthetic shapes, seed {settings.seed}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": described,
    }
    _write(folder / f"instances_{split}.json", json.dumps(coco))
    if settings.keypoints:
        # COCO has such a file beside its instances.
        persons = [annotation for annotation in annotations if "keypoints" in annotation]
        coco |= {"annotations": persons, "categories": described[:1]}
        _write(folder / f"person_keypoints_{split}.json", json.dumps(coco))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees a part."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def categories(keypoints: bool) -> list[JsonObject]:
    """Four categories. With keypoints the first one is a person with COCO's 17."""
    shapes: list[JsonObject] = [
        {"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES)
    ]
    if not keypoints:
        return shapes
    person: JsonObject = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(COCO_KEYPOINTS),
        "skeleton": [list(pair) for pair in COCO_SKELETON],
    }
    return [person, *shapes[1:]]


def draw_image(
    rng: np.random.Generator, size: int, keypoints: bool
) -> tuple[NDArray[np.uint8], list[_Placed]]:
    """uint8 (H, W, 3) with `size` as its long side, and its objects."""
    short = round(size * rng.choice([0.75, 0.85, 1.0]))
    height, width = (size, short) if rng.random() < 0.5 else (short, size)
    image = _ground(rng, height, width)
    objects: list[_Placed] = []
    # The crowd comes first, so that it lies behind everything.
    if rng.random() < CROWD_RATE:
        _try_crowd(rng, image, objects)
    wanted = int(rng.integers(2, 6))
    for _ in range(wanted * 3):  # an attempt may find no room
        if sum(not placed.crowd for placed in objects) >= wanted:
            break
        _try_object(rng, image, objects, keypoints)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), objects


def _try_object(
    rng: np.random.Generator, image: NDArray[np.float64], objects: list[_Placed], keypoints: bool
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
        _rounded(outline * stretch @ rotation * radius + centre, width, height)
        for outline in outlines
    ]
    mask = polygon_mask(polygons, height, width)
    if points is not None:
        points = points * stretch @ rotation * radius + centre
    # Most of every object stays visible.
    if mask.sum() < MIN_PIXELS or any(
        (p.mask & ~mask).sum() < MIN_VISIBLE * whole(p, height, width) for p in objects
    ):
        return
    _paint(rng, image, mask, category, turn)
    objects[:] = [replace(other, mask=other.mask & ~mask) for other in objects]
    objects.append(_Placed(category, polygons, mask, crowd=False, keypoints=points))


def whole(placed: _Placed, height: int, width: int) -> int:
    """Pixels of the object before anything hid it."""
    return int(polygon_mask(placed.polygons, height, width).sum())


def _try_crowd(
    rng: np.random.Generator, image: NDArray[np.float64], objects: list[_Placed]
) -> None:
    """Many small shapes of one category, annotated together."""
    height, width = image.shape[:2]
    category = int(rng.integers(1, 4))  # not the first, which may be the person
    outline = list(SHAPES.values())[category]()
    area = np.array([rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height])
    radius = 0.05 * max(height, width)
    polygons = [
        _rounded(outline * radius + area + rng.normal(0, 2.5 * radius, 2), width, height)
        for _ in range(int(rng.integers(6, 12)))
    ]
    mask = polygon_mask(polygons, height, width)
    if mask.sum() >= MIN_PIXELS:
        _paint(rng, image, mask, category, 0.0)
        objects.append(_Placed(category, polygons, mask, crowd=True, keypoints=None))


def _rounded(polygon: Points, width: int, height: int) -> Points:
    """Kept inside the image and to two decimals, as COCO has them."""
    return np.asarray(np.round(np.clip(polygon, 0, [width, height]), 2), np.float64)


def polygon_mask(polygons: list[Points], height: int, width: int) -> NDArray[np.bool_]:
    """The union, rasterised as pycocotools does."""
    rles = rle_tools.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)
    return np.asarray(rle_tools.decode(rle_tools.merge(rles)), bool)


def _annotation(placed: _Placed, annotation_id: int, image_id: int) -> JsonObject:
    """The COCO annotation of an object. The order of its fields is part of the dataset's bytes."""
    height, width = placed.mask.shape
    # The area is of what can be seen, for polygons too, as pycocotools counts it.
    rle = rle_tools.encode(np.asfortranarray(placed.mask.astype(np.uint8)))
    record: JsonObject = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": placed.category + 1,
        "iscrowd": int(placed.crowd),
    }
    if not placed.crowd and int(placed.mask.sum()) == whole(placed, height, width):
        corners = np.concatenate(placed.polygons)
        low, high = corners.min(0), corners.max(0)
        record |= {
            "segmentation": [polygon.ravel().tolist() for polygon in placed.polygons],
            "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        }
    else:
        record |= {
            "segmentation": Rle(height, width, rle["counts"].decode()).json(),
            "bbox": [float(v) for v in rle_tools.toBbox(rle)],
        }
    record |= {"area": float(rle_tools.area(rle))}
    return (
        record if placed.keypoints is None else record | _keypoints(placed.keypoints, placed.mask)
    )


def _keypoints(points: Points, mask: NDArray[np.bool_]) -> JsonObject:
    """COCO keypoints: 2 for a point that can be seen, 1 for a hidden one, 0 for one off the image.

    points: (17, 2). mask: what can be seen of the person, (H, W).
    """
    height, width = mask.shape
    values: list[int] = []
    for x, y in points:
        inside = 0 <= x < width and 0 <= y < height
        seen = inside and bool(mask[int(y), int(x)])
        values += [int(x), int(y), 2 if seen else 1] if inside else [0, 0, 0]
    return {"keypoints": values, "num_keypoints": sum(v > 0 for v in values[2::3])}


# --- appearance -----------------------------------------------------------------------------------

_HUES = (0.02, 0.14, 0.36, 0.62)  # of the four categories: red, yellow, green, blue


def _ground(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Low-saturation noise at three scales and a gradient."""
    ground: NDArray[np.float64] = np.full((height, width, 3), rng.uniform(0.25, 0.75)) + rng.normal(
        0, 0.04, 3
    )
    for cells, strength in ((3, 0.14), (9, 0.1), (30, 0.06)):
        coarse = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(
            0, strength * 0.3, (cells, cells, 3)
        )
        ground += _enlarge(coarse, height, width)
    grain: NDArray[np.float64] = rng.normal(0, 0.03, (height, width, 1))
    return np.asarray(ground + grain, np.float64)


def _enlarge(coarse: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear, corners at corners."""
    rows, columns = (np.linspace(0, len(coarse) - 1.001, n) for n in (height, width))
    y, x = rows.astype(int), columns.astype(int)
    fy, fx = (rows - y)[:, None, None], (columns - x)[None, :, None]
    top = coarse[y][:, x] * (1 - fx) + coarse[y][:, x + 1] * fx
    bottom = coarse[y + 1][:, x] * (1 - fx) + coarse[y + 1][:, x + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy)


def _paint(
    rng: np.random.Generator,
    image: NDArray[np.float64],
    mask: NDArray[np.bool_],
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
