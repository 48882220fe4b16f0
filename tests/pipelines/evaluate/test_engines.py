"""hotcoco against pycocotools on random datasets: every number the same to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from pipelines.evaluate.checks import checked_results, truth_of
from pipelines.evaluate.engines import curves, default_engine
from pipelines.evaluate.evaluation import evaluate
from tests.pipelines.results import noisy_results
from tests.pipelines.tiny_coco import box_annotation, rle_of, write_coco


def random_coco(seed: int) -> dict[str, Any]:
    """Images of many sizes with polygons of several parts, both kinds of RLE, and crowds.

    Some areas are not those of the masks.
    """
    rng = np.random.default_rng(seed)
    names = [f"point {k}" for k in range(17)]
    categories = [
        {"id": int(k), "name": f"c{k}", "keypoints": names}
        for k in rng.choice(90, rng.integers(1, 6), False)
    ]
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for number in rng.choice(1000, rng.integers(1, 9), replace=False).tolist():
        height, width = rng.integers(20, 200, 2).tolist()
        coco["images"].append({"id": number, "height": height, "width": width})
        for _ in range(rng.integers(0, 8)):
            record = random_object(rng, height, width) | {
                "image_id": number,
                "id": len(coco["annotations"]) + 1,
            }
            coco["annotations"].append(
                record | {"category_id": categories[rng.integers(len(categories))]["id"]}
            )
    return coco


def random_object(rng: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    parts = [
        (rng.uniform(-0.1, 1.1, (rng.integers(3, 9), 2)) * (width, height))
        .clip(0)
        .round(2)
        .ravel()
        .tolist()
        for _ in range(rng.integers(1, 3))
    ]
    rle = rle_of(parts, height, width)
    x, y, w, h = rle_tools.toBbox(rle).tolist()
    crowd = int(rng.random() < 0.15)
    kind = "list" if crowd else rng.choice(["polygons", "text", "list"])
    points = np.column_stack(
        [rng.uniform(x, x + w + 1, 17), rng.uniform(y, y + h + 1, 17), rng.integers(0, 3, 17)]
    )
    points *= points[:, 2:] > (3 if rng.random() < 0.2 else 0)
    if kind == "list":
        flat = rle_tools.decode(rle).ravel(order="F")
        counts: Any = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=0)), flat.size]).tolist()
    else:
        counts = rle["counts"].decode()
    return {
        "bbox": [x, y, w, h],
        "area": float(rle_tools.area(rle)) if rng.random() < 0.8 else float(rng.uniform(0, 20000)),
        "iscrowd": crowd,
        "segmentation": parts
        if kind == "polygons"
        else {"size": [height, width], "counts": counts},
        "keypoints": points.ravel().round(1).tolist(),
        "num_keypoints": int((points[:, 2] > 0).sum()),
    }


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", range(12))
def test_both_engines_give_the_same_bits(kind, seed):
    pytest.importorskip("hotcoco")
    coco = random_coco(seed)
    results = noisy_results(coco, kind, seed) * (
        8 if seed % 4 == 0 else 1
    )  # more than 100 an image, and ties
    truth = truth_of(coco, kind)
    records = checked_results(truth, results, kind)
    reference, fast = (
        curves(engine, truth, records, kind) for engine in ("pycocotools", "hotcoco")
    )
    for name, values in vars(reference).items():
        np.testing.assert_array_equal(getattr(fast, name), values, err_msg=name)


@pytest.mark.parametrize("ids", [(0, 1), (4, 4)])
def test_ids_that_pycocotools_has_quirks_for_are_left_to_it(tmp_path, ids):
    assert default_engine(ids) == "pycocotools"
    path = write_coco(tmp_path, [box_annotation(key) for key in ids])
    detections = [{"image_id": 1, "category_id": 3, "score": 0.9, "bbox": [5, 5, 10, 10]}]
    assert evaluate(path, detections, "bbox") == evaluate(path, detections, "bbox", "pycocotools")


def test_negative_and_huge_ids_are_evaluated_by_both(tmp_path):
    images = [{"id": -5, "height": 30, "width": 40}, {"id": 2**60, "height": 30, "width": 40}]
    annotations = [
        box_annotation(-4, -5, category_id=-3),
        box_annotation(2**61, 2**60, category_id=7),
    ]
    categories = [{"id": -3, "name": "a"}, {"id": 7, "name": "b"}]
    path = write_coco(tmp_path, annotations, images=images, categories=categories)
    detections = [
        {"image_id": i, "category_id": c, "score": 0.9, "bbox": [5, 5, 10, 9]}
        for i, c in ((-5, -3), (2**60, 7))
    ]
    reference = evaluate(path, detections, "bbox", "pycocotools")
    assert evaluate(path, detections, "bbox") == reference
    assert reference.per_class["AP75"] == {"a": pytest.approx(1), "b": pytest.approx(1)}
