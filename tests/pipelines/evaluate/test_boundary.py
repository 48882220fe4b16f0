"""Boundary AP against its definition, written out slowly, on real masks that were disturbed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as rle_tools

from pipelines.__main__ import app
from pipelines.evaluate.boundary import boundary_of, boundary_rle, width_px
from pipelines.evaluate.evaluation import evaluate

Mask = NDArray[np.bool_]


def slow_boundary(mask: Mask, px: int) -> Mask:
    """Pixels of the mask with a pixel that is not of it, or no pixel, within a square around."""
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        rows, columns = range(y - px, y + px + 1), range(x - px, x + px + 1)
        whole = rows[0] >= 0 and columns[0] >= 0 and rows[-1] < height and columns[-1] < width
        edge[y, x] = (
            not whole or not mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        )
    return edge


def slow_iou(one: Mask, other: Mask, px: int, crowd: bool) -> float:
    """The smaller of the two; of a crowd, the share of the detection that lies in it."""

    def iou(a: Mask, b: Mask) -> float:
        below = a.sum() if crowd else (a | b).sum()
        return float((a & b).sum() / below) if below else 0.0

    return min(iou(one, other), iou(slow_boundary(one, px), slow_boundary(other, px)))


def test_a_square_by_hand() -> None:
    # 10 x 10 pixels with 2 px of boundary leave 6 x 6; along the image's edge it counts too.
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 0:10] = 1
    assert boundary_of(mask, 2).sum() == 100 - 36
    assert (width_px(480, 640), width_px(10, 10)) == (16, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_boundary_is_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((60, 90), bool)
    for _ in range(3):
        y, x = rng.integers(0, 50, 2)
        mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 40)] = True
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = rle_tools.decode(boundary_rle(rle)).astype(bool)
    np.testing.assert_array_equal(ours, slow_boundary(mask, width_px(60, 90)))


# --- AP ---------------------------------------------------------------------------------------


def small_truth(coco_mini: Path) -> dict[str, Any]:
    """coco-mini's validation masks at a quarter of their size: the slow definition is slow."""
    coco = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    images = coco["images"][:5]
    sizes = {i["id"]: (i["height"] // 4, i["width"] // 4) for i in images}
    annotations = []
    for a in coco["annotations"]:
        if a["image_id"] not in sizes:
            continue
        height, width = sizes[a["image_id"]]
        if isinstance(a["segmentation"], list):
            polygons = [[side / 4 for side in polygon] for polygon in a["segmentation"]]
            rle = rle_tools.merge(rle_tools.frPyObjects(polygons, height, width))
            mask = rle_tools.decode(rle).astype(bool)
        else:
            size = a["segmentation"]["size"]
            whole = rle_tools.decode(rle_tools.frPyObjects(a["segmentation"], *size))
            mask = whole[::4, ::4][:height, :width].astype(bool)
        if mask.any():
            annotations.append({**a, "segmentation": coded(mask), "area": int(mask.sum())})
    small = [{**i, "height": sizes[i["id"]][0], "width": sizes[i["id"]][1]} for i in images]
    return {"images": small, "annotations": annotations, "categories": coco["categories"]}


def coded(mask: Mask) -> dict[str, Any]:
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def decoded(rle: dict[str, Any]) -> Mask:
    mask: Mask = rle_tools.decode(rle).astype(bool)
    return mask


def disturbed(truth: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Each object moved by a few pixels, some found twice, some in the wrong class."""
    rng = np.random.default_rng(seed)
    results = []
    for a in truth["annotations"]:
        for _ in range(int(rng.integers(1, 3))):
            shift = rng.integers(-2, 3, 2)
            mask = np.roll(decoded(a["segmentation"]), shift, axis=(0, 1))
            category = 1 if rng.random() < 0.1 else a["category_id"]
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": category,
                    "segmentation": coded(mask),
                    "score": float(rng.random()),
                }
            )
    return results


def slow_ap(truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> float:
    """COCO's AP over all sizes, object by object."""
    px = {i["id"]: width_px(i["height"], i["width"]) for i in truth["images"]}
    found = []
    for category in sorted({a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}):
        ours = sorted(
            (r for r in results if r["category_id"] == category), key=lambda r: -r["score"]
        )
        theirs = [a for a in truth["annotations"] if a["category_id"] == category]
        theirs.sort(key=lambda a: a["iscrowd"])
        count = sum(not a["iscrowd"] for a in theirs)
        pairs = {
            (i, k): slow_iou(
                decoded(r["segmentation"]),
                decoded(a["segmentation"]),
                px[r["image_id"]],
                bool(a["iscrowd"]),
            )
            for i, r in enumerate(ours)
            for k, a in enumerate(theirs)
            if r["image_id"] == a["image_id"]
        }
        for threshold in np.linspace(0.5, 0.95, 10):
            found += [_one_ap(ours, theirs, pairs, threshold, count)]
    return float(np.mean(found))


def _one_ap(
    ours: Sequence[Any],
    theirs: Sequence[Any],
    pairs: dict[tuple[int, int], float],
    threshold: float,
    count: int,
) -> float:
    taken: set[int] = set()
    hits = []
    for i in range(len(ours)):
        good = [
            (pairs[i, k], k)
            for k, a in enumerate(theirs)
            if pairs.get((i, k), 0) >= threshold and (k not in taken or a["iscrowd"])
        ]
        real = [pair for pair in good if not theirs[pair[1]]["iscrowd"]]
        if real:
            taken.add(max(real)[1])
            hits.append(True)
        elif not good:  # what lies in a crowd does not count
            hits.append(False)
    tp = np.cumsum(hits)
    recall, precision = tp / count, tp / np.arange(1, len(hits) + 1)
    best = [max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(best))


def test_boundary_ap_is_the_definition_on_real_masks(
    coco_mini: Path, tmp_path: Path, capsys: Any
) -> None:
    truth = small_truth(coco_mini)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    results = disturbed(truth, seed=0)
    ours = evaluate(tmp_path / "gt.json", results, "segm", boundary=True)
    assert ours.stats["AP"] == pytest.approx(slow_ap(truth, results), abs=1e-6)
    masks = evaluate(tmp_path / "gt.json", results, "segm")
    assert 0 < ours.stats["AP"] < masks.stats["AP"]  # a shift costs the boundary more
    assert set(ours.stats) == set(masks.stats)  # by size too
    perfect = [
        {"score": 1.0, **{k: a[k] for k in ("image_id", "category_id", "segmentation")}}
        for a in truth["annotations"]
    ]
    (tmp_path / "dt.json").write_text(json.dumps(perfect))
    whole = evaluate(tmp_path / "gt.json", perfect, "segm", boundary=True)
    assert whole.stats["AP"] == pytest.approx(1.0)
    files = ["--gt", str(tmp_path / "gt.json"), "--dt", str(tmp_path / "dt.json")]
    app(["eval", *files, "--iou", "boundary", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["AP"] == pytest.approx(1.0)


def test_boxes_have_no_boundary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bbox results have no boundary"):
        evaluate(tmp_path / "gt.json", [], "bbox", boundary=True)
