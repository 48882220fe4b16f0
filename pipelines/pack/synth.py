"""A synthetic COCO dataset: images drawn by a seed, with masks, crowds, overlaps and persons.

A whole object is annotated by polygons, a partly hidden one by the RLE of what can be seen. The
same arguments give the same bytes (with the same Pillow).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from contract.words import shortened
from pipelines.coco.records import CocoImage, JsonObject
from pipelines.pack import scenes, shapes
from pipelines.pack.person import COCO_KEYPOINTS, COCO_SKELETON
from pipelines.pack.placed import Draw, annotation
from pipelines.progress import Progress, silent

# shapes: four, told apart by their hue as well (the demo). scenes: twelve, told apart by their
# outline alone. grid: scenes whose boxes lie on the cells of a feature map.
Kind: TypeAlias = Literal["shapes", "scenes", "grid"]

SETTINGS_NAME = "synth.json"
VAL_PART = 5  # one image in so many is for validation
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
    kind: Kind = "shapes"
    test: int = 0
    outlines: int = len(scenes.CATEGORIES)

    def text(self) -> str:
        """The content of the note in OUT, whose bytes tell one dataset from another."""
        # Older notes lack them.
        later = {"kind": "shapes", "test": 0, "outlines": len(scenes.CATEGORIES)}
        return json.dumps({k: v for k, v in asdict(self).items() if later.get(k, ...) != v}) + "\n"

    def splits(self) -> dict[str, int]:
        """Images by split. The place of a split is part of its images' seeds and ids."""
        return {"train": self.train, "val": self.val} | ({"test": self.test} if self.test else {})


@dataclass(frozen=True)
class Synthesised:
    """What `synthesise` did. unchanged: the same dataset was there already."""

    settings: SynthSettings
    unchanged: bool


def synthesise(
    out: Path,
    *,
    num_images: int,
    size: int,
    seed: int,
    keypoints: bool = False,
    kind: Kind = "shapes",
    num_test: int = 0,
    outlines: int = len(scenes.CATEGORIES),
    progress: Progress = silent,
) -> Synthesised:
    """Writes `num_images` in all, a fifth of them (at least one) for validation, and `num_test`.

    Layout: annotations/instances_{train,val,test}.json and images/{train,val,test}/*.jpg; with
    keypoints also annotations/person_keypoints_{train,val,test}.json, the persons alone. Raises
    ValueError if `out` holds another dataset.
    """
    _check_arguments(out, num_images, num_test, size, seed)
    if kind != "shapes" and keypoints:
        raise ValueError(f"--keypoints: --kind {kind} always has persons with keypoints; leave it")
    if kind == "shapes" and outlines != len(scenes.CATEGORIES):
        raise ValueError("--outlines: --kind shapes always has its four; leave it")
    if not 2 <= outlines <= len(scenes.CATEGORIES):
        raise ValueError(f"--outlines is {outlines}; give 2 to {len(scenes.CATEGORIES)}")
    num_val = max(1, num_images // VAL_PART)
    settings = SynthSettings(
        VERSION,
        num_images - num_val,
        num_val,
        size,
        seed,
        keypoints or kind != "shapes",
        kind,
        num_test,
        outlines,
    )
    draw = _draw_of(settings)
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
    for number, (split, count) in enumerate(settings.splits().items()):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        images: list[JsonObject] = []
        annotations: list[JsonObject] = []
        for k in range(count):
            image_id = number * 1_000_000 + k + 1  # ids of the splits never meet, as in COCO
            # Keyed by the image alone: it stays the same when the dataset grows.
            rng = np.random.default_rng([seed, number, k])
            pixels, objects = draw(rng, size)
            height, width = pixels.shape[:2]
            image = CocoImage(image_id, f"{image_id:07d}.jpg", width, height)
            Image.fromarray(pixels).save(out / "images" / split / image.file_name, quality=92)
            images.append(image.json())
            annotations += [
                annotation(placed, annotation_id, image_id)
                for annotation_id, placed in enumerate(objects, len(annotations) + 1)
            ]
            drawn += 1
            progress(drawn, num_images + num_test)
        _write_annotations(out / "annotations", split, settings, images, annotations)
    _write(note, settings.text())  # last: without it the dataset is not finished
    return Synthesised(settings, unchanged=False)


def _draw_of(settings: SynthSettings) -> Draw:
    match settings.kind:
        case "shapes":
            return partial(shapes.draw_shapes, keypoints=settings.keypoints)
        case "scenes":
            return partial(scenes.draw_scene, outlines=settings.outlines, on_grid=False)
        case "grid":
            return partial(scenes.draw_scene, outlines=settings.outlines, on_grid=True)


def _check_arguments(out: Path, num_images: int, num_test: int, size: int, seed: int) -> None:
    if num_images < 2:
        raise ValueError(
            f"--images is {num_images}; give at least 2, one to train on and one to validate on"
        )
    if num_test < 0:
        raise ValueError(f"--test is {num_test}; give 0 or more")
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
    described = categories(settings)
    coco: JsonObject = {
        "info": {"description": f"synthetic {settings.kind}, seed {settings.seed}"},
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


def categories(settings: SynthSettings) -> list[JsonObject]:
    """The categories of a dataset. With keypoints the first one is a person with COCO's 17."""
    named = scenes.CATEGORIES[: settings.outlines]
    names = tuple(shapes.SHAPES) if settings.kind == "shapes" else named
    things: list[JsonObject] = [
        {"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(names)
    ]
    if not settings.keypoints:
        return things
    person: JsonObject = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(COCO_KEYPOINTS),
        "skeleton": [list(pair) for pair in COCO_SKELETON],
    }
    return [person, *things[1:]]
