"""Pack, export: pycocotools computes the same numbers to the bit, and no field is lost."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.pack.pack import PackOptions, pack
from pipelines.shards.dataset import open_dataset
from tests.pipelines.pack.test_pack import RLE_TEXT
from tests.pipelines.results import noisy_results
from tests.pipelines.tiny_coco import box_annotation, packed_coco


def evaluated(truth: Path, results: list, iou_type: str) -> tuple[np.ndarray, ...]:
    """pycocotools by itself: precision, recall, scores and stats."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(truth))
        run = COCOeval(ground_truth, ground_truth.loadRes([dict(r) for r in results]), iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.eval["precision"], run.eval["recall"], run.eval["scores"], run.stats


def assert_round_trip(
    files: list[Path], images: Path, folder: Path, kinds: tuple[str, ...]
) -> None:
    pack(files, str(images), str(folder / "packed"), PackOptions(shard_mib=1))
    exported = folder / "exported.json"
    exported.write_text(json.dumps(open_dataset(str(folder / "packed")).coco()))
    before, after = (json.loads(path.read_text()) for path in (files[0], exported))
    for key in ("images", "annotations", "categories"):
        assert sorted(after[key], key=lambda r: r["id"]) == sorted(
            before[key], key=lambda r: r["id"]
        )
    assert (after["info"], after["licenses"]) == (
        before.get("info", {}),
        before.get("licenses", []),
    )
    for kind in kinds:
        results = noisy_results(before, kind)
        truths = [
            only_keypoints(path, folder) if kind == "keypoints" else path
            for path in (files[0], exported)
        ]
        for one, two in zip(*(evaluated(truth, results, kind) for truth in truths), strict=True):
            np.testing.assert_array_equal(one, two)
            assert one.max() > 0.05


def only_keypoints(path: Path, folder: Path) -> Path:
    """A copy without objects that have no keypoints: pycocotools fails on them."""
    coco = json.loads(path.read_text())
    coco["annotations"] = [
        annotation for annotation in coco["annotations"] if "keypoints" in annotation
    ]
    copy = folder / f"{path.stem}-keypoints.json"
    copy.write_text(json.dumps(coco))
    return copy


def test_synthetic_data_comes_back_whole(shapes, tmp_path):
    files = [shapes / "annotations" / "instances_train.json"]
    assert_round_trip(files, shapes / "images" / "train", tmp_path, ("bbox", "segm", "keypoints"))


@pytest.mark.parametrize(
    ("name", "kinds"), [("instances", ("bbox", "segm")), ("person_keypoints", ("keypoints",))]
)
def test_real_coco_comes_back_whole(coco_mini, tmp_path, name, kinds):
    files = [coco_mini / "annotations" / f"{name}_val2017.json"]
    assert_round_trip(files, coco_mini / "val2017", tmp_path, kinds)


def test_unknown_fields_and_both_kinds_of_rle_come_back(tmp_path):
    annotations = [
        box_annotation(1, segmentation=RLE_TEXT, note={"by": "hand"}),
        box_annotation(2, segmentation={"size": [30, 40], "counts": [100, 50, 1050]}, iscrowd=1),
        box_annotation(3, segmentation=[], score=0.5),
        {key: value for key, value in box_annotation(4).items() if key != "segmentation"},
        box_annotation(5, bbox=[1.25, 2, 0, 3], area=0.1),
    ]
    images = [
        {"id": 1, "file_name": "1.jpg", "width": 40, "height": 30, "camera": "left", "license": 3}
    ]
    from tests.pipelines.tiny_coco import noise_image

    (tmp_path / "images").mkdir()
    noise_image().save(tmp_path / "images" / "1.jpg")
    coco = packed_coco(tmp_path, annotations, images=images).coco()
    assert coco["images"] == images
    assert coco["annotations"] == annotations
