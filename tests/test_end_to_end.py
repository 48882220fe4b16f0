"""A study on real COCO images in every room: pack, submit, Ray, DDP training, MLflow, report."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
STUDY = """
name: mini
question: does the RoI operation matter?
baseline:
  preset: r50-fpn
  set:
    model.weights.kind: none
    model.backbone.norm: {kind: gn, groups: 32}
    model.backbone.frozen_stages: 0
    model.image: {short_side_px: 128, max_side_px: 192}
    model.rpn.post_nms_train: 64
    model.rpn.post_nms_test: 32
    model.sampling.rois_per_image: 16
    model.inference.detections_per_image: 10
    data.short_sides_px: [128]
    data.max_side_px: 192
    data.num_loader_workers: 0
    schedule: {kind: one_cycle}
    loop.steps: 3
    loop.global_batch: 2
    loop.log_every_steps: 1
factors:
  roi:
    align: {}
    pool: {model.roi.kind: pool}
resources: {ranks: 1, cpus_per_rank: 1}
"""


@pytest.fixture(scope="module")
def coco_mini() -> Path:
    folder = Path(
        os.environ.get("MASKRAY_COCO_MINI", ROOT.parent / "shared" / "data" / "coco-mini")
    )
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no real COCO images: {folder} does not exist; set MASKRAY_COCO_MINI")
    return folder


class House:
    """An empty folder with its own home, in which `maskray` runs as a newcomer's does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir()
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
        }
        self.environment.pop("MASKRAY_SERVER", None)

    def maskray(self, *words: str, status: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *words, "--json"],
            cwd=self.folder,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, (
            f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        assert done.stdout.count("\n") == 1, f"{words} printed more than one line: {done.stdout}"
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    folder = Path(tempfile.mkdtemp(prefix="mr-"))  # short: Ray's sockets have at most 107 bytes
    built = House(folder)
    try:
        yield built
    finally:
        built.maskray("down")
        shutil.rmtree(folder)


def pack_subset(house: House, coco_mini: Path, split: str, num_images: int, out: str) -> None:
    """Packs the first images of a split that have annotations."""
    whole = json.loads((coco_mini / "annotations" / f"instances_{split}2017.json").read_text())
    with_objects = {annotation["image_id"] for annotation in whole["annotations"]}
    images = [image for image in whole["images"] if image["id"] in with_objects][:num_images]
    kept = {image["id"] for image in images}
    annotations = [
        annotation for annotation in whole["annotations"] if annotation["image_id"] in kept
    ]
    file = house.folder / f"{split}-{num_images}.json"
    file.write_text(json.dumps({**whole, "images": images, "annotations": annotations}))
    images_folder = str(coco_mini / f"{split}2017")
    house.maskray(
        "data", "pack", "--annotations", str(file), "--images", images_folder, "--out", out
    )
    assert house.maskray("data", "verify", out)["samples"] == num_images


def test_a_two_arm_study_on_real_images_ends_in_mlflow_and_a_report(house, coco_mini):
    pack_subset(house, coco_mini, "train", 8, "coco/train")
    pack_subset(house, coco_mini, "val", 4, "coco/val")
    study = house.folder / "mini.yaml"
    study.write_text(STUDY)

    planned = house.maskray("plan", str(study), "--data", "coco")
    assert [trial["cached"] for trial in planned["trials"]] == [False, False]

    result = house.maskray("run", str(study), "--data", "coco")
    assert result["state"] == "done"
    assert [(trial["arm"], trial["state"]) for trial in result["trials"]] == [
        ({"roi": "align"}, "done"),
        ({"roi": "pool"}, "done"),
    ]
    assert all({"bbox/AP", "segm/AP75"} <= trial["metrics"].keys() for trial in result["trials"])
    page = Path(result["report"]).read_text()
    assert "align" in page
    assert "pool" in page

    database = sqlite3.connect(next(house.folder.glob(".maskray/**/mlflow.db")))
    tags = dict(
        database.execute(
            "select key || '=' || value, run_uuid from tags where key = 'maskray.trial'"
        )
    )
    assert len(tags) == 2
    for run in tags.values():
        metrics = {
            key
            for (key,) in database.execute(
                "select distinct key from metrics where run_uuid = ?", (run,)
            )
        }
        assert {
            "loss/mask",
            "loss/box_class",
            "lr",
            "bbox/AP",
            "segm/AP",
            "images_per_s",
        } <= metrics
        parameters = dict(
            database.execute("select key, value from params where run_uuid = ?", (run,))
        )
        assert parameters["model.layout.kind"] == "fpn"
        parent = database.execute(
            "select value from tags where run_uuid = ? and key = 'mlflow.parentRunId'", (run,)
        )
        assert parent.fetchone() is not None
    database.close()

    again = house.maskray("plan", str(study), "--data", "coco")
    assert [trial["cached"] for trial in again["trials"]] == [True, True]


def test_a_trial_that_raises_is_reported_and_the_others_finish(house, coco_mini):
    pack_subset(house, coco_mini, "train", 8, "coco/train")
    pack_subset(house, coco_mini, "val", 4, "coco/val")
    pack_subset(house, coco_mini, "train", 6, "broken")
    for shard in (house.folder / "broken").glob("shard-*.arrow"):  # only reading can find out
        shard.unlink()
    study = house.folder / "half.yaml"
    arms = "factors:\n  data:\n    whole: {}\n    broken: {data.train: broken}\nmax_attempts: 1\n"
    other = (
        STUDY.split("factors:")[0]
        .replace("name: mini", "name: half")
        .replace("steps: 3", "steps: 2")
    )
    study.write_text(other + arms)

    result = house.maskray("run", str(study), "--data", "coco", status=1)
    assert result["state"] == "failed"
    whole, lost = result["trials"]
    assert (whole["state"], whole["attempts"]) == ("done", 1)
    assert lost["state"] == "failed"
    assert "shard" in lost["error"]

    shown = house.maskray("status", result["study"])
    assert shown["trials"][1]["error"] == lost["error"]
    database = sqlite3.connect(next(house.folder.glob(".maskray/**/mlflow.db")))
    failed = database.execute(
        "select status from runs join tags using (run_uuid) "
        "where key = 'maskray.trial' and value = ?",
        (lost["trial"],),
    )
    assert failed.fetchone() == ("FAILED",)
    database.close()
