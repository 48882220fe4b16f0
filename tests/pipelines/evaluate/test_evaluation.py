from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle_tools

from pipelines.evaluate.evaluation import encode_crop, evaluate, image_results, read_results
from pipelines.shards.dataset import open_dataset
from tests.pipelines.results import noisy_results
from tests.pipelines.test_round_trip import evaluated, only_keypoints
from tests.pipelines.tiny_coco import box_annotation, packed_coco, write_coco


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_the_numbers_are_pycocotools_and_do_not_depend_on_the_order(shapes, tmp_path, kind):
    path = shapes / "annotations" / "instances_train.json"
    results = noisy_results(json.loads(path.read_text()), kind)
    before = json.dumps(results)
    forwards, backwards = evaluate(path, results, kind), evaluate(path, results[::-1], kind)
    assert forwards == backwards
    assert json.dumps(results) == before, "results are not changed"
    assert evaluate(open_dataset(str(shapes / "train")), results, kind) == forwards
    ordered = sorted(
        results, key=lambda r: (r["image_id"], r["category_id"], -r["score"], *map(str, r.values()))
    )
    stats = evaluated(
        only_keypoints(path, tmp_path) if kind == "keypoints" else path, ordered, kind
    )[3]
    names = list(forwards.stats)
    assert names[:3] == ["AP", "AP50", "AP75"]
    if kind == "keypoints":
        assert names[3:] == ["APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    else:
        assert names[3:] == ["APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
        kept = [value for value in forwards.per_class["AP"].values() if value >= 0]
        assert np.mean(kept) == pytest.approx(forwards.stats["AP"])
    np.testing.assert_allclose(list(forwards.stats.values()), stats, atol=0.02)


def test_perfect_and_no_detections(tmp_path):
    path = write_coco(tmp_path, [box_annotation(1), box_annotation(2, category_id=7)])
    perfect = [
        {"image_id": 1, "category_id": c, "score": 0.9, "bbox": [5, 5, 10, 10]} for c in (3, 7)
    ]
    assert evaluate(path, perfect, "bbox").stats["AP"] == pytest.approx(1)
    nothing = evaluate(path, [], "bbox")
    assert (nothing.stats["AP"], nothing.stats["APl"]) == (0, -1)
    assert nothing.per_class["AP"] == {"cat": 0, "dog": 0}
    half = evaluate(path, perfect[:1], "bbox")
    assert half.per_class["AP"] == {"cat": pytest.approx(1), "dog": 0}


def test_a_narrowed_dataset_is_evaluated_on_its_categories(tmp_path):
    from contract.data import DataConfig, Filter

    dataset = packed_coco(tmp_path, [box_annotation(1), box_annotation(2, category_id=7)])
    cfg = DataConfig(train="t", val="v", filter=Filter(categories=("dog",)))
    view = dataset.for_evaluation(cfg)
    detections = [{"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [5, 5, 10, 10]}]
    assert evaluate(view, detections, "bbox").stats["AP"] == pytest.approx(1)
    assert evaluate(dataset, detections, "bbox").stats["AP"] == pytest.approx(0.5)


MASK = {"size": [30, 40], "counts": [0, 1200]}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bbox", {"bbox": ...}, "has no 'bbox', which bbox results need"),
        ("bbox", {"image_id": 9}, "is for image 9"),
        ("bbox", {"image_id": "1"}, "image_id is '1'"),
        ("bbox", {"image_id": True}, "image_id is True"),
        ("bbox", {"category_id": 3.0}, "category_id is 3.0"),
        ("bbox", {"category_id": 99}, "is of category 99"),
        ("bbox", {"score": math.nan}, "score is nan"),
        ("bbox", {"score": "0.9"}, "score is '0.9'"),
        ("bbox", {"score": True}, "score is True"),
        ("bbox", {"score": 10**400}, "score is 1000"),
        ("bbox", {"bbox": [1, 2, 3]}, "bbox is .1, 2, 3."),
        ("bbox", {"bbox": [1, 2, math.inf, 4]}, "bbox is .*inf"),
        ("bbox", {"bbox": "1234"}, "bbox is '1234'"),
        ("segm", {"segmentation": None}, "segmentation is None"),
        ("segm", {"segmentation": []}, "segmentation is .*; give an RLE"),
        ("segm", {"segmentation": [[1, 2, 3, 4]]}, "segmentation is"),
        ("segm", {"segmentation": [["a"] * 6]}, "segmentation is"),
        (
            "segm",
            {"segmentation": MASK | {"size": [40, 30]}},
            "its mask is of size .40, 30., image 1 is .30, 40.",
        ),
        ("segm", {"segmentation": MASK | {"size": 5}}, "its mask is of size 5"),
        ("segm", {"segmentation": MASK | {"counts": [9, 9]}}, "segmentation is"),
        ("segm", {"segmentation": MASK | {"counts": "!"}}, "segmentation is"),
        ("segm", {"segmentation": {"size": [30, 40]}}, "segmentation is"),
        ("keypoints", {"keypoints": [1.0, 2.0, 1.0]}, "keypoints must be x, y, score of 17 points"),
        ("keypoints", {"keypoints": [math.nan] * 51}, "keypoints must be"),
        ("keypoints", {"keypoints": "x" * 51}, "keypoints must be"),
        ("keypoints", {"keypoints": None}, "keypoints must be"),
    ],
)
def test_results_that_do_not_fit_are_named(tmp_path, kind, fields, message):
    path = write_coco(tmp_path, [box_annotation(1)])
    good = {"image_id": 1, "category_id": 3, "score": 1, "bbox": [0, 0, 9, 9], "segmentation": MASK}
    bad = {key: value for key, value in (good | fields).items() if value is not ...}
    evaluate(path, [good] if kind != "keypoints" else [], kind)
    with pytest.raises(ValueError, match=f"^result 1:? ?.*{message}") as caught:
        evaluate(path, [good | {"keypoints": [1.0] * 51}, bad], kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bbox", {"bbox": [1, 2, 3]}, "annotation 1: bbox is"),
        ("bbox", {"area": None}, "annotation 1: area is None"),
        ("bbox", {"iscrowd": "0"}, "annotation 1: iscrowd is '0'"),
        ("bbox", {"image_id": "1"}, r"annotations\[0\]: image_id is '1'"),
        ("segm", {"segmentation": "x"}, "annotation 1: segmentation is"),
        (
            "keypoints",
            {"keypoints": [1, 2, 2, 3]},
            "annotation 1: keypoints is .* write x, y, v for each point",
        ),
    ],
)
def test_ground_truth_that_cannot_be_compared_is_named(tmp_path, kind, fields, message):
    path = write_coco(tmp_path, [box_annotation(1, **fields)])
    with pytest.raises(ValueError, match=message):
        evaluate(path, [], kind)


def test_files_of_another_kind_are_refused(tmp_path):
    path = write_coco(tmp_path, [box_annotation(1)])
    with pytest.raises(ValueError, match="holds a dict; give a COCO results file"):
        read_results(path)
    with pytest.raises(ValueError, match="no such file"):
        read_results(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; give a COCO annotation file"):
        evaluate(tmp_path / "list.json", [], "bbox")


def test_results_of_an_image_are_coco():
    boxes, scores, labels = np.array([[1.0, 2, 4, 8]]), np.array([0.5], np.float32), np.array([1])
    assert image_results(7, boxes, scores, labels, (3, 9)) == [
        {"image_id": 7, "category_id": 9, "score": 0.5, "bbox": [1, 2, 3, 6]}
    ]
    [mask] = image_results(7, boxes, scores, labels, (3, 9), rles=[{"size": [4, 4], "counts": "a"}])
    assert "bbox" not in mask
    [points] = image_results(7, boxes, scores, labels, (3, 9), keypoints=np.ones((1, 2, 3)))
    assert points["keypoints"] == [1] * 6


@given(st.data())
def test_encoding_a_crop_equals_encoding_the_whole_mask(data):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    h, w = data.draw(st.integers(0, height - top)), data.draw(st.integers(0, width - left))
    bits = data.draw(st.lists(st.integers(0, 1), min_size=h * w, max_size=h * w))
    crop = np.array(bits, np.uint8).reshape(h, w)
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[top : top + h, left : left + w] = crop
    rle = encode_crop(crop, top, left, height, width)
    assert rle == {"size": [height, width], "counts": rle_tools.encode(whole)["counts"].decode()}
