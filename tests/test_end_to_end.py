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
import yaml
from pycocotools import mask as mask_tools

ROOT = Path(__file__).parent.parent
STUDY = """
name: mini
question: does the RoI operation matter?
baseline:
  preset: r50-fpn
  set:
    model.weights.kind: none
    model.backbone.depth: 18
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
resources: {ranks: 1, cpus_per_rank: 1}
factors:
  roi:
    align: {}
    pool: {model.roi.kind: pool}
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
        self.walked: set[str] = set()  # commands that ran
        (folder / "home").mkdir()
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
        }
        self.environment.pop("MASKRAY_SERVER", None)

    def maskray(self, *words: str, status: int = 0) -> Any:
        """The command's answer in JSON."""
        text = self.text(*words, "--json", status=status)
        assert text.count("\n") == 1, f"{words} printed more than one line: {text}"
        return json.loads(text)

    def text(self, *words: str, status: int = 0, module: str = "orchestrator") -> str:
        """What the command prints."""
        self.walked.add(words[0] if words[0] != "data" else f"data {words[1]}")
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=self.folder,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, (
            f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout


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


def test_a_study_on_real_images_ends_in_mlflow_and_a_report_and_a_lost_arm_costs_no_other(
    house, coco_mini
):
    pack_subset(house, coco_mini, "train", 8, "coco/train")
    pack_subset(house, coco_mini, "val", 4, "coco/val")
    pack_subset(house, coco_mini, "train", 6, "broken")
    for shard in (house.folder / "broken").glob("shard-*.arrow"):  # only reading can find out
        shard.unlink()
    study = house.folder / "mini.yaml"
    study.write_text(f"{STUDY}    lost: {{data.train: broken}}\nmax_attempts: 1\n")

    planned = house.maskray("plan", str(study), "--data", "coco")
    assert [trial["cached"] for trial in planned["trials"]] == [False, False, False]

    result = house.maskray("run", str(study), "--data", "coco", status=1)
    assert result["state"] == "failed"
    assert [(*trial["arm"].values(), trial["state"]) for trial in result["trials"]] == [
        ("align", "done"),
        ("pool", "done"),
        ("lost", "failed"),
    ]
    *whole, lost = result["trials"]
    assert all({"bbox/AP", "segm/AP75"} <= trial["metrics"].keys() for trial in whole)
    assert "shard" in lost["error"]
    assert house.maskray("status", "last")["trials"][2]["error"] == lost["error"]
    page = Path(result["report"]).read_text()
    assert "align" in page
    assert "pool" in page

    database = sqlite3.connect(next(house.folder.glob(".maskray/**/mlflow.db")))

    def column(query: str, run: str) -> list[str]:
        return [value for (value,) in database.execute(query, (run,))]

    statuses = "select status from runs join tags using (run_uuid) where key = 'maskray.trial'"
    assert column(f"{statuses} and value = ?", lost["trial"]) == ["FAILED"]
    for trial in whole:
        [run] = column(
            "select run_uuid from tags where key = 'maskray.trial' and value = ?", trial["trial"]
        )
        metrics = set(column("select distinct key from metrics where run_uuid = ?", run))
        told = {"loss/mask", "loss/box_class", "lr", "bbox/AP", "segm/AP", "images_per_s"}
        assert told <= metrics
        layout = "select value from params where run_uuid = ? and key = 'model.layout.kind'"
        assert column(layout, run) == ["fpn"]
        parent = "select value from tags where run_uuid = ? and key = 'mlflow.parentRunId'"
        assert len(column(parent, run)) == 1
    database.close()

    again = house.maskray("plan", str(study), "--data", "coco")
    assert [trial["cached"] for trial in again["trials"]] == [True, True, False]


# --- every documented command on real images --------------------------------------------------

# What the published studies of keypoints need to fit into a test.
SMALL = {
    "model.weights.kind": "none",
    "model.backbone": {"kind": "resnet", "depth": 18, "norm": {"kind": "gn"}, "frozen_stages": 0},
    "model.image": {"short_side_px": 128, "max_side_px": 192},
    "model.rpn.post_nms_train": 64,
    "model.rpn.post_nms_test": 32,
    "model.sampling.rois_per_image": 16,
    "model.inference.detections_per_image": 10,
    "data.short_sides_px": [128],
    "data.max_side_px": 192,
    "data.num_loader_workers": 0,
    "schedule": {"kind": "one_cycle"},
    "loop.steps": 2,
    "loop.global_batch": 2,
    "loop.log_every_steps": 1,
    "loop.eval_boundary": True,
}
# They wait for a person, need a service of one's own or a bucket, or are what the others stand on.
NOT_WALKED = {"watch", "ui", "serve", "user", "gc", "sync", "data stage", "data synth", "down"}
# These have tests of their own.
NOT_WALKED |= {"predict", "export", "register", "backup", "restore", "--version"}


def reduced(house: House, name: str) -> Path:
    """A published study at a size that a test can pay."""
    spec = yaml.safe_load((ROOT / "studies" / f"{name}.yaml").read_text())
    dropped = ("schedule.drop_steps",)
    kept = {path: value for path, value in spec["baseline"]["set"].items() if path not in dropped}
    spec["baseline"]["set"] = {**kept, **SMALL}
    spec |= {"seeds": [0], "resources": {"ranks": 1, "cpus_per_rank": 1}}
    file = house.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    return file


def pack_with_keypoints(house: House, coco_mini: Path) -> None:
    """Both of COCO's annotation files, which differ in the last digit of some areas."""
    for split in ("train", "val"):
        files = [
            str(coco_mini / "annotations" / f"{kind}_{split}2017.json")
            for kind in ("instances", "person_keypoints")
        ]
        both = [word for file in files for word in ("--annotations", file)]
        images = str(coco_mini / f"{split}2017")
        house.maskray("data", "pack", *both, "--images", images, "--out", f"persons/{split}")


@pytest.mark.slow
def test_tables_5_and_6_run_on_real_persons(house, coco_mini):
    pack_with_keypoints(house, coco_mini)
    five = house.maskray("run", str(reduced(house, "table-5")), "--data", "persons")
    assert five["state"] == "done"
    tasks = {tuple(trial["arm"].values()): trial["metrics"].keys() for trial in five["trials"]}
    assert len(tasks) == 4
    for (masks, keypoints), metrics in tasks.items():
        assert ("segm/AP" in metrics, "boundary/APs" in metrics) == (masks == "on",) * 2
        assert ("keypoints/AP" in metrics) == (keypoints == "on")
    six = house.maskray("run", str(reduced(house, "table-6")), "--data", "persons")
    assert [trial["state"] for trial in six["trials"]] == ["done", "done"]
    written = house.maskray("report", "last", "--format", "json", "--out", "six")
    said = json.loads((house.folder / written["file"]).read_text())
    # 39 images of 2 steps are not the paper, and the report says in what.
    assert any("loop.steps is 2, the paper's is 90000" in line for line in said["paper"]["barred"])


@pytest.mark.slow
def test_every_documented_command_walks_through_real_images(house, coco_mini):
    pack_subset(house, coco_mini, "train", 8, "coco/train")
    pack_subset(house, coco_mini, "val", 4, "coco/val")
    house.maskray("data", "show", "coco/val", "--masks", "--out", "samples.png")
    assert (house.folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    house.maskray("data", "export", "coco/val", "--out", "back.json")
    truth = json.loads((house.folder / "back.json").read_text())
    perfect = [
        {"score": 1.0, **{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    rle = [
        {**one, "segmentation": mask} for one, mask in zip(perfect, masks_of(truth), strict=True)
    ]
    house.maskray("data", "join", "coco/train", "coco/val", "--out", "coco/both")
    assert house.maskray("data", "verify", "coco/both")["samples"] == 12
    (house.folder / "dt.json").write_text(json.dumps(rle))
    for iou in ("bbox", "segm", "boundary"):
        got = house.maskray("eval", "--gt", "back.json", "--dt", "dt.json", "--iou", iou)
        assert got["AP"] == pytest.approx(1.0)
    for what in ("study", "run"):
        assert house.maskray("schema", what)["properties"]
    study = house.folder / "walk.yaml"
    study.write_text(STUDY.replace("name: mini", "name: walk"))
    assert house.maskray("plan", str(study), "--data", "coco")["trials"]
    sent = house.maskray("submit", str(study), "--data", "coco")
    assert house.maskray("queue") is not None
    house.maskray("cancel", sent["study"])
    done = house.maskray("run", str(study), "--data", "coco")
    assert done["state"] == "done"
    assert house.maskray("status", "last")["state"] == "done"
    key = done["trials"][0]["key"]
    assert house.text("logs", f"last:{key}")
    house.maskray("report", "last")
    house.maskray("doctor")
    again = house.maskray("reproduce", f"last:{key}")
    assert again
    report = str(Path(done["report"]).with_name("report.json"))
    assert house.maskray("compare", report)["contrasts"]
    run = house.folder / "run.yaml"
    spec = yaml.safe_load(STUDY)["baseline"]
    paths = {**spec["set"], "data.train": "coco/train", "data.val": "coco/val"}
    run.write_text(yaml.safe_dump({"preset": spec["preset"]}))
    words = [w for path, value in paths.items() for w in ("--set", f"{path}={json.dumps(value)}")]
    house.text("train", "run.yaml", *words, "--out", "runs/one")
    house.maskray("proposals", "runs/one", "--out", "proposals/one.arrow")
    assert documented() - NOT_WALKED <= house.walked


def documented() -> set[str]:
    """The commands in the console blocks of README and docs."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for text in texts for line in text.read_text().splitlines()]
    words = [line.split()[2:4] for line in lines if line.startswith("$ maskray ")]
    return {" ".join(pair) if pair[0] == "data" else pair[0] for pair in words}


def masks_of(truth: dict[str, Any]) -> list[Any]:
    """The truth's masks as detections have them: run lengths."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    masks = []
    for a in truth["annotations"]:
        if not a["iscrowd"]:
            rle = mask_tools.merge(mask_tools.frPyObjects(a["segmentation"], *sizes[a["image_id"]]))
            masks.append({**rle, "counts": rle["counts"].decode()})
    return masks
