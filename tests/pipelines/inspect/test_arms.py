"""The arms side by side on drawn shapes, and the kinds of their errors as TIDE counts them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from contract.data import DataConfig
from contract.inspection.arms import ArmDetections, ArmsPlan
from pipelines.evaluate.errors import Errors, ImageMatches
from pipelines.evaluate.evaluation import evaluate
from pipelines.inspect.arms import inspect_arms
from pipelines.shards.dataset import open_dataset
from tests.pipelines.results import noisy_results
from tests.pipelines.tiny_coco import rle_of


def matches(
    detections: list[tuple[float, int, list[float]]], truths: list[tuple[int, list[float]]]
):
    iou = np.zeros((len(detections), len(truths)))
    if detections and truths:
        boxes = [box for *_, box in detections], [box for _, box in truths]
        iou = np.asarray(rle_tools.iou(*boxes, [0] * len(truths)))
    return ImageMatches(
        np.array([score for score, *_ in detections]),
        np.array([label for _, label, _ in detections], np.int64),
        np.array([label for label, _ in truths], np.int64),
        iou,
        np.zeros(len(detections), bool),
    )


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((0.8, 2, [0, 0, 10, 10]), "classification"),
        ((0.8, 1, [0, 0, 10, 4]), "localisation"),
        ((0.8, 2, [0, 0, 10, 4]), "both"),
        ((0.8, 1, [50, 50, 9, 9]), "background"),
        (None, "missed"),
    ],
)
def test_each_kind_costs_what_putting_it_right_gains(detection, kind):
    """One object, and one wrong detection of it: only its own kind would gain all of AP50."""
    errors = Errors()
    errors.add(matches([detection] if detection else [], [(1, [0, 0, 10, 10])]))
    assert errors.missed[1] == (kind not in ("classification", "localisation"))
    kinds = {one.kind for one in errors.found}
    assert kinds == ({kind} if detection else set())
    base, costs = errors.costs()
    repairable = kind in ("classification", "localisation")
    assert base == 0.0
    assert costs[kind] == (1.0 if repairable else 0.0)
    assert sum(costs.values()) == costs[kind]


def test_the_second_detection_of_an_object_is_a_duplicate():
    errors = Errors()
    box = [0, 0, 10, 10]
    errors.add(matches([(0.9, 1, box), (0.8, 1, box), (0.7, 1, box)], [(1, box)]))
    assert [one.kind for one in errors.found] == [None, "duplicate", "duplicate"]


def test_the_numbers_of_tide():
    """tidecv 1.0.1 on the same boxes with every image known to it."""
    rng = np.random.default_rng(0)
    errors = Errors()
    for _ in range(60):
        truths: list[tuple[int, list[float]]] = []
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(8, 40, 2)]
            truths.append((int(rng.integers(1, 4)), box))
        found: list[tuple[float, int, list[float]]] = []
        for label, box in truths:
            for _ in range(rng.integers(0, 3)):
                score = float(rng.uniform())
                own = label if rng.uniform() < 0.8 else int(rng.integers(1, 4))
                corner = [v + rng.normal() * rng.choice([1, 6, 15]) for v in box[:2]]
                sides = [max(4, v + rng.normal() * 3) for v in box[2:]]
                found.append((score, own, corner + sides))
        for _ in range(rng.integers(0, 3)):
            score, own = float(rng.uniform()) * 0.5, int(rng.integers(1, 4))
            found.append((score, own, [*rng.uniform(0, 90, 2), *rng.uniform(8, 40, 2)]))
        errors.add(matches(sorted(found, key=lambda one: -one[0]), truths))
    base, costs = errors.costs()
    assert 100 * base == pytest.approx(10.267196185558687)
    assert {kind: round(100 * cost, 6) for kind, cost in costs.items()} == {
        "classification": 3.286208,
        "localisation": 28.350452,
        "both": 0.77804,
        "duplicate": 0.067626,
        "background": 2.257853,
        "missed": 7.117979,
    }


def test_arms_side_by_side(shapes, tmp_path):
    """An arm that finds everything, and one that finds a part of it."""
    uri = str(shapes / "train")
    dataset = open_dataset(uri)
    coco = dataset.coco()
    sizes = {one["id"]: (one["height"], one["width"]) for one in coco["images"]}

    def text(rle):
        counts = rle["counts"]
        return rle | {"counts": counts.decode() if isinstance(counts, bytes) else counts}

    perfect = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "score": 0.9,
            "segmentation": text(rle_of(one["segmentation"], *sizes[one["image_id"]])),
        }
        for one in coco["annotations"]
    ]
    noisy = noisy_results(coco, "segm")
    for name, results in (("perfect", perfect), ("noisy", noisy)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    plan = ArmsPlan(
        data=DataConfig(train=uri, val=uri),
        kind="segm",
        trials=tuple(
            ArmDetections(arm=n, seed=0, folder=str(tmp_path), path=f"{n}.json", pictures=True)
            for n in ("perfect", "noisy")
        ),
        colours={"perfect": "#e0813a", "noisy": "#3b82c4"},
    )
    answer = inspect_arms(plan)
    best, worse = answer.errors
    assert best.ap50 == pytest.approx(1.0)
    assert not any(best.costs.values())
    assert worse.ap50 == pytest.approx(evaluate(dataset, noisy, "segm").stats["AP50"])
    groups = [row.group for row in answer.rows]
    assert groups == ["random"] * 4 + ["disagreement"] * 4
    for row in answer.rows:
        assert [one.arm for one in row.pictures] == ["", "perfect", "noisy"]
        for one in row.pictures:
            with Image.open(io.BytesIO(base64.b64decode(one.jpeg))) as image:
                assert max(image.size) == 320
    last = answer.rows[-1].pictures
    assert last[1].caption == "IoU 1.00"
    assert last[2].caption < "IoU 0.90"
