"""The same images for all arms, where arms disagree most, and the kinds of their errors.

`python -m pipelines.inspect.arms PLAN ANSWER`: both are JSON of `contract.inspection.arms`. The
report spawns it, because its own room reads no images.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as rle_tools

from contract.command import run_command
from contract.files import Files
from contract.inspection.arms import (
    ArmDetections,
    ArmErrors,
    ArmPicture,
    ArmsAnswer,
    ArmsPlan,
    PictureRow,
)
from pipelines.coco.records import CocoAnnotation
from pipelines.coco.rle import compressed
from pipelines.evaluate.errors import Errors, ImageMatches
from pipelines.load.sample import read_image
from pipelines.shards.dataset import Dataset, open_dataset
from pipelines.shards.keyed_random import shuffled

NUM_RANDOM, NUM_DISAGREEMENTS = 4, 4
MIN_SCORE = 0.5  # of a detection that is drawn
MAX_DETECTIONS = 100  # of an image, as COCO counts them
_SIDE_PX = 320  # of a picture
_MARGIN = 0.35  # around an object, of its sides
_MIN_AREA_PX = 64.0  # of an object whose edge one can see
_TRUTH_COLOUR = "#ffffff"

Result = Mapping[str, Any]
Pixels = NDArray[np.uint8]
Window = tuple[int, int, int, int]  # x0, y0, x1, y1


@dataclass
class _Arm:
    """What is kept of one arm's drawn trial. best: object's id -> the best IoU with it."""

    drawn: dict[int, list[Result]] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)


def inspect_arms(plan: ArmsPlan) -> ArmsAnswer:
    """Reads each trial's detections once, one after the other: one file may be a gigabyte."""
    dataset = open_dataset(plan.data.val, cache_gib=plan.data.cache_gib).for_evaluation(plan.data)
    truth = {int(image): dataset.annotations(int(image)) for image in dataset.image_ids()}
    sizes = {row.image_id: (row.height, row.width) for row in map(dataset.row, dataset.rows())}
    errors: list[ArmErrors] = []
    arms: dict[str, _Arm] = {}
    for trial in plan.trials:
        summed, arm = Errors(), _Arm()
        by_image = _results(trial)
        for image, objects in truth.items():
            results = by_image.get(image, [])
            _look(plan.kind, results, objects, sizes[image], summed, arm)
            if trial.pictures:
                arm.drawn[image] = [one for one in results if one["score"] >= MIN_SCORE]
        ap50, costs = summed.costs()
        errors.append(ArmErrors(arm=trial.arm, seed=trial.seed, ap50=ap50, costs={**costs}))
        if trial.pictures:
            arms[trial.arm] = arm
    rows = [*_random(plan, dataset, truth, arms), *_disagreements(plan, dataset, truth, arms)]
    return ArmsAnswer(rows=tuple(rows), errors=tuple(errors), min_score=MIN_SCORE)


def _results(trial: ArmDetections) -> dict[int, list[Result]]:
    """Image -> its results, best first."""
    by_image: dict[int, list[Result]] = {}
    for one in json.loads(Files(trial.folder).read(trial.path)):
        by_image.setdefault(one["image_id"], []).append(one)
    for results in by_image.values():
        results.sort(key=lambda one: -one["score"])
        del results[MAX_DETECTIONS:]
    return by_image


def _look(
    kind: str,
    results: Sequence[Result],
    annotations: Sequence[CocoAnnotation],
    size: tuple[int, int],
    errors: Errors,
    arm: _Arm,
) -> None:
    """One image of one trial: its errors, and how well each object is found."""
    counted = [one for one in annotations if not one.iscrowd]
    crowds = [one for one in annotations if one.iscrowd]
    shapes = [_shape(kind, one) for one in results]
    iou = _iou(shapes, [_true_shape(kind, one, size) for one in counted], 0)
    on_crowd = _iou(shapes, [_true_shape(kind, one, size) for one in crowds], 1)
    labels = np.array([one["category_id"] for one in results], np.int64)
    of_crowd = np.array([one.category_id for one in crowds], np.int64)
    scores = np.array([one["score"] for one in results], np.float64)
    right = np.array([one.category_id for one in counted], np.int64)
    ignored = ((on_crowd > 0.5) & (labels[:, None] == of_crowd)).any(axis=1)
    errors.add(ImageMatches(scores, labels, right, iou, ignored))
    sure = (scores >= MIN_SCORE)[:, None] & (labels[:, None] == right)
    found = np.where(sure, iou, 0.0).max(axis=0, initial=0.0)
    arm.best.update(zip((one.id for one in counted), found.tolist(), strict=True))


def _shape(kind: str, result: Result) -> Any:
    return result["segmentation"] if kind == "segm" else result["bbox"]


def _true_shape(kind: str, annotation: CocoAnnotation, size: tuple[int, int]) -> Any:
    if kind == "bbox":
        return annotation.bbox
    if not annotation.segmentation:  # an object without a mask has an empty one
        return rle_tools.encode(np.zeros(size, np.uint8, order="F"))
    return compressed(annotation.segmentation, *size).json()


def _iou(shapes: list[Any], others: list[Any], crowd: int) -> NDArray[np.float64]:
    if not shapes or not others:
        return np.zeros((len(shapes), len(others)))
    return np.asarray(rle_tools.iou(shapes, others, [crowd] * len(others)), np.float64)


# --- which images -------------------------------------------------------------------------------

_Truth = Mapping[int, Sequence[CocoAnnotation]]


def _random(
    plan: ArmsPlan, dataset: Dataset, truth: _Truth, arms: Mapping[str, _Arm]
) -> list[PictureRow]:
    """The same ones in every study on this data: nobody chose them."""
    images = sorted(truth)
    chosen = [images[i] for i in shuffled(len(images), 0)[:NUM_RANDOM]]
    rows = []
    for image in chosen:
        pixels = _pixels(dataset, image)
        whole = (0, 0, pixels.shape[1], pixels.shape[0])
        row = _row(plan, image, pixels, whole, truth[image], arms)
        rows.append(PictureRow(group="random", caption=f"image {image}", pictures=row))
    return rows


def _disagreements(
    plan: ArmsPlan, dataset: Dataset, truth: _Truth, arms: Mapping[str, _Arm]
) -> list[PictureRow]:
    """The objects that the arms find most unequally well, one of an image, up to their edge."""
    if len(arms) < 2:
        return []
    spreads = []
    for image, objects in truth.items():
        for one in objects:
            values = [arm.best.get(one.id, 0.0) for arm in arms.values()]
            if not one.iscrowd and one.area >= _MIN_AREA_PX and max(values) > min(values):
                spreads.append((max(values) - min(values), image, one))
    spreads.sort(key=lambda item: (-item[0], item[1], item[2].id))
    rows, seen = [], set[int]()
    for _, image, one in spreads:
        if image in seen or len(seen) == NUM_DISAGREEMENTS:
            continue
        seen.add(image)
        pixels = _pixels(dataset, image)
        window = _around(one.bbox, pixels.shape[1], pixels.shape[0])
        notes = {name: f"IoU {arm.best.get(one.id, 0.0):.2f}" for name, arm in arms.items()}
        row = _row(plan, image, pixels, window, truth[image], arms, notes)
        name = next(c.name for c in dataset.categories if c.id == one.category_id)
        caption = f"{name} of image {image}"
        rows.append(PictureRow(group="disagreement", caption=caption, pictures=row))
    return rows


def _around(bbox: Sequence[float], width: int, height: int) -> Window:
    x, y, w, h = bbox
    dx, dy = max(_MARGIN * w, 4), max(_MARGIN * h, 4)
    return (
        max(int(x - dx), 0),
        max(int(y - dy), 0),
        min(int(np.ceil(x + w + dx)), width),
        min(int(np.ceil(y + h + dy)), height),
    )


# --- drawing ------------------------------------------------------------------------------------


def _pixels(dataset: Dataset, image: int) -> Pixels:
    number = dataset.rows()[int(np.flatnonzero(dataset.image_ids() == image)[0])]
    return np.asarray(read_image(dataset.row(number), dataset).permute(1, 2, 0).numpy())


def _row(
    plan: ArmsPlan,
    image: int,
    pixels: Pixels,
    window: Window,
    annotations: Sequence[CocoAnnotation],
    arms: Mapping[str, _Arm],
    notes: Mapping[str, str] | None = None,
) -> tuple[ArmPicture, ...]:
    """The truth, then each arm: edges drawn on the enlarged pixels."""
    size = pixels.shape[0], pixels.shape[1]
    true = [_true_shape(plan.kind, one, size) for one in annotations if not one.iscrowd]
    drawn = [ArmPicture(arm="", caption="truth", jpeg=_jpeg(pixels, window, true, _TRUTH_COLOUR))]
    for name, arm in arms.items():
        shapes = [_shape(plan.kind, one) for one in arm.drawn.get(image, [])]
        jpeg = _jpeg(pixels, window, shapes, plan.colours.get(name, _TRUTH_COLOUR))
        note = (notes or {}).get(name, f"{len(shapes)} detections")
        drawn.append(ArmPicture(arm=name, caption=note, jpeg=jpeg))
    return tuple(drawn)


def _jpeg(pixels: Pixels, window: Window, shapes: Iterable[Any], colour: str) -> str:
    x0, y0, x1, y1 = window
    scale = _SIDE_PX / max(x1 - x0, y1 - y0)
    side = max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1)
    image = Image.fromarray(pixels[y0:y1, x0:x1]).resize(side, Image.Resampling.BICUBIC)
    canvas = np.asarray(image).copy()
    ink = np.array(ImageColor.getrgb(colour), np.uint8)
    boxes = []
    for shape in shapes:
        if isinstance(shape, dict):
            part = np.asarray(rle_tools.decode(shape), np.uint8)[y0:y1, x0:x1]
            # Nearest: the edge is that of the mask's own pixels.
            large = np.asarray(Image.fromarray(part * 255).resize(side, Image.Resampling.NEAREST))
            inside = large > 0
            canvas[inside] = (0.75 * canvas[inside] + 0.25 * ink).astype(np.uint8)
            canvas[_edge(inside)] = ink
        else:
            x, y, w, h = shape
            boxes.append(
                [(x - x0) * scale, (y - y0) * scale, (x + w - x0) * scale, (y + h - y0) * scale]
            )
    image = Image.fromarray(canvas)
    for box in boxes:
        ImageDraw.Draw(image).rectangle(box, outline=colour, width=2)
    sink = io.BytesIO()
    image.save(sink, "jpeg", quality=85)
    return base64.b64encode(sink.getvalue()).decode()


def _edge(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of the mask within two of its outside."""
    core = inside.copy()
    for _ in range(2):
        padded = np.pad(core, 1)
        core &= padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        raise ValueError("give two arguments, the files of the plan and of the answer")
    plan = ArmsPlan.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    Path(argv[1]).write_text(inspect_arms(plan).model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.nice(10)  # pictures of a report wait for trials, which may share this machine
    sys.exit(run_command(lambda: main(sys.argv[1:]), sys.argv[1:]))
