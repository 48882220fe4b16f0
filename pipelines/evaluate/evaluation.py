"""COCO evaluation: detections to results, and pycocotools' numbers by name.

Results are sorted before an engine sees them, because tied scores move AP with the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools
from pycocotools.cocoeval import Params

from contract.metrics import stats_of
from pipelines.evaluate.checks import (
    check_truth,
    checked_results,
    read_json,
    with_keypoints,
    with_masks,
)
from pipelines.evaluate.engines import Curves, Engine, IouType, curves, default_engine
from pipelines.shards.dataset import Dataset


@dataclass(frozen=True)
class Evaluation:
    """stats: pycocotools' summary by name, fractions, -1 where there is nothing to evaluate.

    per_class: statistic (AP, AP50, AP75, APs, APm, APl) -> category name (with its id where two share it) -> value.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]


def image_results(
    image_id: int,
    boxes_xyxy: NDArray[Any],
    scores: NDArray[Any],
    labels: NDArray[Any],
    category_ids: Sequence[int],
    rles: Sequence[Mapping[str, Any]] | None = None,
    keypoints: NDArray[Any] | None = None,
) -> list[dict[str, Any]]:
    """COCO results of one image: of boxes, or of masks where `rles` are given, or of `keypoints` (D, P, 3).

    One kind at a time: pycocotools takes an object's area from its box where a result has one, and APs, APm and APl of
    masks would then be those of boxes.
    """
    if rles is not None and keypoints is not None:
        raise ValueError(
            "image_results gives one kind of result; call it once for masks and once for keypoints"
        )
    results: list[dict[str, Any]] = []
    for number, (x0, y0, x1, y1) in enumerate(np.asarray(boxes_xyxy, np.float64).tolist()):
        result: dict[str, Any] = {
            "image_id": int(image_id),
            "category_id": int(category_ids[int(labels[number])]),
            "score": float(scores[number]),
        }
        if rles is not None:
            result["segmentation"] = dict(rles[number])
        elif keypoints is not None:
            result["keypoints"] = np.asarray(keypoints[number], np.float64).ravel().tolist()
        else:
            result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        results.append(result)
    return results


def encode_crop(
    crop: NDArray[np.uint8], top: int, left: int, height: int, width: int
) -> dict[str, Any]:
    """COCO RLE (counts as text) of a (height, width) mask that is `crop` at (top, left) and zero elsewhere."""
    h, w = crop.shape
    if w == 0 or h == 0:
        flat = np.zeros(0, np.uint8)
        start = 0
    else:
        columns = np.zeros((w, height), np.uint8)
        columns[:, top : top + h] = np.asarray(crop).T
        flat, start = columns.ravel(), left * height
    changes = np.flatnonzero(np.diff(flat, prepend=0, append=0)) + start
    counts = np.diff(np.concatenate([[0], changes, [height * width]]))
    rle: dict[str, Any] = rle_tools.frPyObjects(
        {"size": [height, width], "counts": counts.tolist()}, height, width
    )
    return {"size": [height, width], "counts": rle["counts"].decode()}


def evaluate(
    truth: Dataset | str | Path,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    engine: Engine | None = None,
) -> Evaluation:
    """pycocotools' evaluation of COCO results on a dataset view (as loaders have it in `.dataset`) or a COCO JSON file.

    The order of `results` does not matter, and they are not changed. Raises ValueError if they do not fit. engine:
    None takes the fastest that is installed; they give the same numbers to the bit.
    """
    coco = _ground_truth(truth, iou_type)
    ordered = sorted(checked_results(coco, results, iou_type), key=_canonical)
    found = curves(engine or default_engine(coco), coco, ordered, iou_type)
    names = stats_of(iou_type)
    stats = {name: float(value) for name, value in zip(names, found.stats, strict=True)}
    return Evaluation(stats, _per_class(found, coco, iou_type))


def _ground_truth(truth: Dataset | str | Path, iou_type: IouType) -> dict[str, Any]:
    if isinstance(truth, Dataset):
        coco = truth.coco()
    else:
        coco = read_json(Path(truth), dict, "a COCO annotation file")
        check_truth(Path(truth), coco)
    coco["annotations"] = [{"iscrowd": 0, **annotation} for annotation in coco["annotations"]]
    match iou_type:
        case "bbox":
            return coco
        case "segm":
            return with_masks(coco)
        case "keypoints":
            return with_keypoints(coco)


def read_results(path: Path) -> list[dict[str, Any]]:
    """A COCO results file. Raises ValueError if it is something else."""
    results: list[dict[str, Any]] = read_json(
        path, list, "a COCO results file, a list of detections"
    )
    return results


def _canonical(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """By image, category, score from the top, then what was detected."""
    mask = result.get("segmentation")
    what = [result.get("bbox", []), result.get("keypoints", []), str(mask) if mask else ""]
    return result["image_id"], result["category_id"], -result["score"], what


def _per_class(
    found: Curves, coco: dict[str, Any], iou_type: IouType
) -> dict[str, dict[str, float]]:
    """AP of each category from the precisions at the largest number of detections."""
    params = Params(iou_type)
    precision = found.precision[..., -1]
    names = _names_apart(coco["categories"])
    areas = {label: place for place, label in enumerate(params.areaRngLbl)}
    picks: dict[str, tuple[Any, int]] = {"AP": (slice(None), areas["all"])}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        place = int(np.argmin(abs(np.asarray(params.iouThrs) - threshold)))
        picks[name] = (slice(place, place + 1), areas["all"])
    picks |= {
        f"AP{label[0]}": (slice(None), place)
        for label, place in areas.items()
        if label in ("small", "medium", "large")
    }
    return {
        stat: {name: _mean(precision[rows, :, k, area]) for k, name in enumerate(names)}
        for stat, (rows, area) in picks.items()
    }


def _names_apart(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """By ascending id; two categories of one name are told apart by their ids."""
    often = Counter(category["name"] for category in categories)
    return [
        c["name"] if often[c["name"]] == 1 else f"{c['name']} (id {c['id']})"
        for c in sorted(categories, key=lambda category: int(category["id"]))
    ]


def _mean(values: NDArray[np.float64]) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0
