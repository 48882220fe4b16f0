"""Synthetic manifests and studies: what `expand` reads of a dataset, without a dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contract.answers import TrialView
from contract.record import parse_record
from contract.study import Study
from orchestrator.study.code_package import CodePackage

CODE = CodePackage(sha256="c" * 64, data=b"", source_hash="5" * 64, origin="tests")
SHAPES = ("circle", "square", "triangle", "star")
COCO_80 = ("person", *(f"category-{i}" for i in range(2, 81)))
PERSON_KEYPOINTS = ["nose", *(f"{side}_{i}" for i in range(8) for side in ("left", "right"))]


def write_manifest(
    folder: Path,
    names: Sequence[str] = SHAPES,
    *,
    images: int = 10,
    masks: bool = True,
    keypoints: bool = False,
) -> Path:
    """A folder with the manifest of a packed dataset and no shards."""
    categories: list[dict[str, Any]] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    if keypoints:
        categories[0]["keypoints"] = PERSON_KEYPOINTS
    header = {
        "schema_version": 1,
        "num_images": images,
        "num_annotations": 3 * images,
        "num_shards": 1,
        "categories": categories,
        "has_masks": masks,
        "has_keypoints": keypoints,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(header))
    return folder


def write_dataset(folder: Path, names: Sequence[str] = SHAPES, **options: Any) -> Path:
    """`folder` with train and val, as `--data` takes it."""
    for split in ("train", "val"):
        write_manifest(folder / split, names, **options)
    return folder


def write_named_files(study: Study, folder: Path) -> None:
    """A file of a few bytes for every weights and proposals that the study names."""
    for name in re.findall(r"[\w./-]+\.(?:pth|arrow)", study.model_dump_json()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def tiny_study(factors: Mapping[str, Any] | None = None, **fields: Any) -> Study:
    data = {"name": "test", "baseline": {"preset": "tiny"}, "factors": factors or {}, **fields}
    return parse_record(Study, data, "tests")


def finished(arm: Mapping[str, str], seed: int, baseline: bool = False, **fields: Any) -> TrialView:
    """A trial that is done, with `metrics` and whatever else is given."""
    key = ",".join(f"{factor}={level}" for factor, level in arm.items()) + f"/seed-{seed}"
    values: dict[str, Any] = {
        "trial": key.replace("/", "-"),
        "key": key,
        "study": "s1",
        "arm": dict(arm),
        "seed": seed,
        "baseline": baseline,
        "state": "done",
        "attempts": 1,
        **fields,
    }
    return TrialView.model_validate(values)
