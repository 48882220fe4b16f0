"""COCO evaluation: detections to results, and pycocotools' numbers by name.

pycocotools is the reference and does the work. Results are sorted first, because tied scores move AP with the order.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.dataset import Dataset

IouType = Literal["bbox", "segm", "keypoints"]
_BOX_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
_NEEDED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


@dataclass(frozen=True)
class Evaluation:
    """stats: pycocotools' summary by name, fractions, -1 where there is nothing to evaluate.

    per_class: statistic (AP, AP50, AP75, APs, APm, APl) -> category name -> value.
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
        raise ValueError("image_results gives one kind of result; call it once for masks and once for keypoints")
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


def encode_crop(crop: NDArray[np.uint8], top: int, left: int, height: int, width: int) -> dict[str, Any]:
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
    rle: dict[str, Any] = rle_tools.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def evaluate(truth: Dataset | str | Path, results: Sequence[Mapping[str, Any]], iou_type: IouType) -> Evaluation:
    """pycocotools' evaluation of COCO results on a dataset view (as loaders have it in `.dataset`) or a COCO JSON file.

    The order of `results` does not matter, and they are not changed. Raises ValueError if they do not fit.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = _ground_truth(truth, iou_type)
        found = _load_results(ground_truth, results, iou_type)
        run = COCOeval(ground_truth, found, iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = _KEYPOINT_STATS if iou_type == "keypoints" else _BOX_STATS
    stats = {name: float(value) for name, value in zip(names, run.stats, strict=True)}
    return Evaluation(stats, _per_class(run, ground_truth))


def _ground_truth(truth: Dataset | str | Path, iou_type: IouType) -> COCO:
    ground_truth = COCO()
    if isinstance(truth, Dataset):
        ground_truth.dataset = truth.coco()
    else:
        ground_truth.dataset = _read_json(Path(truth), dict, "a COCO annotation file")
        _check_truth(Path(truth), ground_truth.dataset)
    if iou_type == "keypoints":
        ground_truth.dataset = _with_keypoints(ground_truth.dataset)
    ground_truth.createIndex()
    return ground_truth


def _with_keypoints(coco: dict[str, Any]) -> dict[str, Any]:
    """Only what has keypoints, as COCO's person_keypoints files; pycocotools fails on annotations without."""
    annotations = [
        {"num_keypoints": sum(v > 0 for v in a["keypoints"][2::3]), **a}
        for a in coco["annotations"]
        if a.get("keypoints")
    ]
    named = {a["category_id"] for a in annotations}
    categories = [c for c in coco["categories"] if c.get("keypoints") or c["id"] in named]
    return coco | {"annotations": annotations, "categories": categories}


def _check_truth(path: Path, coco: Mapping[str, Any]) -> None:
    needed = {
        "images": ("id",),
        "annotations": ("id", "image_id", "category_id", "bbox", "area"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        records = coco.get(part)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path}: {part!r} is no list of records; give a COCO annotation file")
        for number, record in enumerate(records):
            missing = [key for key in keys if key not in record]
            if missing:
                raise ValueError(f"{path}: {part}[{number}] has no {missing[0]!r}; give a COCO annotation file")


def read_results(path: Path) -> list[dict[str, Any]]:
    """A COCO results file. Raises ValueError if it is something else."""
    results: list[dict[str, Any]] = _read_json(path, list, "a COCO results file, a list of detections")
    return results


def _read_json(path: Path, kind: type, what: str) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give {what}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give {what}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give {what}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: holds a {type(value).__name__}; give {what}")
    return value


def _load_results(ground_truth: COCO, results: Sequence[Mapping[str, Any]], iou_type: IouType) -> COCO:
    known = set(ground_truth.getImgIds())
    for number, result in enumerate(results):
        for key in ("image_id", "category_id", "score", _NEEDED[iou_type]):
            if not isinstance(result, Mapping) or key not in result:
                raise ValueError(f"result {number} has no {key!r}, which {iou_type} results need; mend it or --iou")
        _check_result(number, result, iou_type)
        if result["image_id"] not in known:
            raise ValueError(f"result {number} is for image {result['image_id']}, which the ground truth does not have")
        if iou_type != "keypoints" and result["category_id"] not in ground_truth.cats:
            raise ValueError(
                f"result {number} is of category {result['category_id']}, which the ground truth does not have"
            )
        if iou_type == "segm":
            _check_mask(number, result["segmentation"], ground_truth.imgs[result["image_id"]])
    if not results:
        empty = COCO()
        empty.dataset = dict(ground_truth.dataset, annotations=[])
        empty.createIndex()
        return empty
    ordered = sorted(copy.deepcopy(list(results)), key=_canonical)
    return ground_truth.loadRes(ordered)


def _check_result(number: int, result: Mapping[str, Any], iou_type: IouType) -> None:
    for key in ("image_id", "category_id"):
        if not isinstance(result[key], int):
            raise ValueError(f"result {number}: {key} is {result[key]!r}; it must be a whole number")
    if not _is_number(result["score"]):
        raise ValueError(f"result {number}: score is {result['score']!r}; it must be a finite number")
    box = result.get("bbox", (0, 0, 0, 0))
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise ValueError(f"result {number}: bbox is {box!r}; it must be 4 finite numbers")
    if iou_type == "keypoints":
        points = result["keypoints"]
        if not isinstance(points, list | tuple) or len(points) % 3 or not all(_is_number(v) for v in points):
            raise ValueError(f"result {number}: keypoints must be x, y, score for each point, all finite numbers")


def _check_mask(number: int, mask: Any, image: Mapping[str, Any]) -> None:
    if not isinstance(mask, Mapping):
        return  # polygons, which pycocotools rasterises at the image's size
    wanted = [image.get("height"), image.get("width")]
    if list(mask.get("size", [])) != wanted:
        raise ValueError(f"result {number}: its mask is of size {mask.get('size')}, image {image['id']} is {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _canonical(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """By image, category, score from the top, then what was detected."""
    mask = result.get("segmentation")
    what = [result.get("bbox", []), result.get("keypoints", []), str(mask) if mask else ""]
    return result["image_id"], result["category_id"], -result["score"], what


def _per_class(run: COCOeval, ground_truth: COCO) -> dict[str, dict[str, float]]:
    """AP of each category from the precision array (thresholds, recalls, categories, areas, maxDets)."""
    precision: NDArray[np.float64] = run.eval["precision"][..., -1]
    names = [ground_truth.cats[key]["name"] for key in run.params.catIds]
    areas = {label: place for place, label in enumerate(run.params.areaRngLbl)}
    picks: dict[str, tuple[Any, int]] = {"AP": (slice(None), areas["all"])}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        place = int(np.argmin(abs(np.asarray(run.params.iouThrs) - threshold)))
        picks[name] = (slice(place, place + 1), areas["all"])
    picks |= {
        f"AP{label[0]}": (slice(None), place) for label, place in areas.items() if label in ("small", "medium", "large")
    }
    return {
        stat: {name: _mean(precision[rows, :, k, area]) for k, name in enumerate(names)}
        for stat, (rows, area) in picks.items()
    }


def _mean(values: NDArray[np.float64]) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0
