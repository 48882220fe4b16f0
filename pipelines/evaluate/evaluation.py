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
from pycocotools.cocoeval import Params

from contract.metrics import stats_of
from pipelines.coco.collector import collector_paused
from pipelines.coco.records import CocoCategory, CocoResult, JsonObject, JsonValue, Rle
from pipelines.coco.rle import compressed
from pipelines.evaluate.checks import check_truth, checked_results, read_json, truth_of
from pipelines.evaluate.engines import (
    COCO_SIGMAS,
    Curves,
    Engine,
    IouType,
    Truth,
    curves,
    default_engine,
    sigmas_for,
)
from pipelines.shards.dataset import Dataset


@dataclass(frozen=True)
class Evaluation:
    """stats: pycocotools' summary by name, fractions, -1 where there is nothing to evaluate.

    per_class: statistic (AP, AP50, AP75, APs, APm, APl) -> category name -> value. A name that two
    categories share has the id beside it. notes: where COCO's rules leave something out.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()


def image_results(
    image_id: int,
    boxes_xyxy: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    category_ids: Sequence[int],
    rles: Sequence[Mapping[str, JsonValue]] | None = None,
    keypoints: NDArray[np.float32] | None = None,
) -> list[JsonObject]:
    """COCO results of one image: of boxes, or of masks if `rles` are given, or of `keypoints`.

    boxes_xyxy: (D, 4). scores, labels: (D,). category_ids: dense label -> COCO id. keypoints:
    (D, P, 3). One kind at a time: pycocotools takes an object's area from its box where a result
    has one, and APs, APm and APl of masks would then be those of boxes.
    """
    if rles is not None and keypoints is not None:
        raise ValueError(
            "image_results gives one kind of result; call it once for masks and once for keypoints"
        )
    results = []
    # In doubles, so that width and height are not rounded to float32.
    for number, (x0, y0, x1, y1) in enumerate(np.asarray(boxes_xyxy, np.float64).tolist()):
        what: JsonObject
        if rles is not None:
            what = {"segmentation": dict(rles[number])}
        elif keypoints is not None:
            what = {"keypoints": np.asarray(keypoints[number], np.float64).ravel().tolist()}
        else:
            what = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
        placed: JsonObject = {
            "image_id": int(image_id),
            "category_id": int(category_ids[int(labels[number])]),
            "score": float(scores[number]),
        }
        results.append(placed | what)
    return results


def encode_crop(
    crop: NDArray[np.uint8], top: int, left: int, height: int, width: int
) -> JsonObject:
    """COCO RLE of a (height, width) mask that is `crop` at (top, left) and zero elsewhere.

    Its counts are text. Only the columns of the crop are looked at, not the whole image.
    """
    h, w = crop.shape
    # COCO's runs go down the columns, so the transposed crop lies in their order. A row of zeros
    # above and one below it end every run in its column.
    columns = np.zeros((w, h + 2), np.uint8)
    columns[:, 1:-1] = np.asarray(crop).T
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    changes = (left + column) * height + top + row
    # A run that reaches from the last row into the next column's first one has ended for nothing.
    if h == height and len(changes):
        kept = np.ones(len(changes), bool)
        cut = np.flatnonzero(changes[1:] == changes[:-1])
        kept[cut] = kept[cut + 1] = False
        changes = changes[kept]
    ends = np.concatenate([[0], changes, [height * width]])
    lengths = (ends[1:] - ends[:-1]).tolist()
    return compressed(Rle(height, width, lengths), height, width).json()


@collector_paused()
def evaluate(
    truth: Dataset | str | Path,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    engine: Engine | None = None,
    sigmas: Sequence[float] = (),
    boundary: bool = False,
) -> Evaluation:
    """pycocotools' evaluation of COCO results.

    truth: a dataset view, as loaders have it in `.dataset`, or a COCO JSON file. results: in any
    order; they are not changed. engine: None takes the fastest that is installed; all give the
    same numbers to the bit. sigmas: of OKS, empty for those of `sigmas_for`. boundary: Boundary AP,
    of masks alone. Raises ValueError if the results do not fit the truth.
    """
    if boundary and iou_type != "segm":
        raise ValueError(f"Boundary AP is of masks; {iou_type} results have no boundary")
    known, ordered, scale = compared(truth, results, iou_type, sigmas)
    engine = engine or default_engine([annotation.id for annotation in known.annotations])
    # hotcoco knows COCO's sigmas alone.
    engine = engine if scale == COCO_SIGMAS else "pycocotools"
    measured = curves(engine, known, ordered, iou_type, scale, boundary)
    return evaluation_of(measured, known, ordered, iou_type)


def evaluation_of(
    measured: Curves, known: Truth, ordered: Sequence[CocoResult], iou_type: IouType
) -> Evaluation:
    """The numbers of an engine by name. known, ordered: as `compared` gave them to it."""
    names = stats_of(iou_type)
    stats = {name: float(value) for name, value in zip(names, measured.stats, strict=True)}
    per_class = _per_class(measured.precision, known.categories, iou_type)
    return Evaluation(stats, per_class, _notes(known, ordered, iou_type))


def compared(
    truth: Dataset | str | Path,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    sigmas: Sequence[float] = (),
) -> tuple[Truth, list[CocoResult], Sequence[float]]:
    """Checked truth, checked results in the order that every evaluation takes, and OKS sigmas."""
    known = truth_of(_ground_truth(truth), iou_type)
    ordered = sorted(checked_results(known, results, iou_type), key=_canonical)
    own = truth.oks_sigmas if isinstance(truth, Dataset) and not sigmas else sigmas
    # The sigmas are of OKS alone: boxes and masks have none, whatever the data says.
    scale = sigmas_for(known.num_keypoints, own) if iou_type == "keypoints" else COCO_SIGMAS
    return known, ordered, scale


def _notes(truth: Truth, results: Sequence[CocoResult], iou_type: IouType) -> tuple[str, ...]:
    """Where COCO's rules leave something out without a word."""
    most = max(Params(iou_type).maxDets)
    objects = Counter((a.image_id, a.category_id) for a in truth.annotations if not a.iscrowd)
    found = Counter((result.image_id, result.category_id) for result in results)
    missed, dropped = (
        sum(max(count - most, 0) for count in counts.values()) for counts in (objects, found)
    )
    notes = []
    if missed:
        notes.append(
            f"COCO counts the best {most} detections of a category in an image: {missed} of "
            f"{objects.total()} objects cannot be found, {dropped} of {found.total()} detections "
            "do not count"
        )
    if iou_type == "keypoints" and truth.num_keypoints != len(COCO_SIGMAS):
        notes.append(
            f"COCO has no sigmas for {truth.num_keypoints} keypoints: OKS takes those of "
            "data.oks_sigmas, or the mean of COCO's for each"
        )
    if any(annotation.id == 0 for annotation in truth.annotations):
        notes.append("pycocotools takes annotation id 0 for 'unmatched'; number them from 1")
    return tuple(notes)


def _ground_truth(truth: Dataset | str | Path) -> Mapping[str, Any]:
    if isinstance(truth, Dataset):
        coco = truth.coco()
        # pycocotools takes id 0 for "unmatched"; ids are the file's own affair and score nothing.
        if any(annotation["id"] == 0 for annotation in coco["annotations"]):
            for number, annotation in enumerate(coco["annotations"], 1):
                annotation["id"] = number
        return coco
    coco = read_json(Path(truth), dict, "a COCO annotation file")
    check_truth(Path(truth), coco)
    return coco


def read_results(path: Path) -> list[dict[str, Any]]:
    """A COCO results file, unchecked. Raises ValueError if it is something else."""
    return read_json(path, list, "a COCO results file, a list of detections")


def _canonical(result: CocoResult) -> tuple[int, int, float, list[float], list[float], str]:
    """By image, category, score from the top, then what was detected."""
    # Tied scores move AP with their order, and ranks deliver in any order.
    mask = str(result.segmentation.counts) if result.segmentation else ""
    box, points = result.bbox or [], result.keypoints or []
    return result.image_id, result.category_id, -result.score, box, points, mask


def _per_class(
    precision: NDArray[np.float64], categories: Sequence[CocoCategory], iou_type: IouType
) -> dict[str, dict[str, float]]:
    """AP of each category at the largest number of detections. precision: (T, R, K, A, M)."""
    params = Params(iou_type)
    names = _names_apart(categories)
    areas = {label: place for place, label in enumerate(params.areaRngLbl)}
    every = slice(None)
    picks = {"AP": (every, areas.pop("all"))}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        # The thresholds are sums of 0.05 and not exact, so the nearest one is taken.
        place = int(np.argmin(abs(np.asarray(params.iouThrs) - threshold)))
        picks[name] = (slice(place, place + 1), picks["AP"][1])
    picks |= {f"AP{label[0]}": (every, place) for label, place in areas.items()}
    return {
        stat: {name: _mean(precision[rows, :, k, area, -1]) for k, name in enumerate(names)}
        for stat, (rows, area) in picks.items()
    }


def _names_apart(categories: Sequence[CocoCategory]) -> list[str]:
    """By ascending id. Two categories of one name get their ids beside it."""
    counts = Counter(category.name for category in categories)
    return [
        c.name if counts[c.name] == 1 else f"{c.name} (id {c.id})"
        for c in sorted(categories, key=lambda category: category.id)
    ]


def _mean(values: NDArray[np.float64]) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
