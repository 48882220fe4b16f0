"""COCO's precision and recall by pycocotools, the reference, or by hotcoco: the same to the bit, sooner.

hotcoco is an optional dependency, used where it is installed. `tests/pipelines/evaluate/test_engines.py` compares
precision, recall, scores and statistics on random datasets.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Engine = Literal["pycocotools", "hotcoco"]
IouType = Literal["bbox", "segm", "keypoints"]
NEEDED = {
    "bbox": "bbox",
    "segm": "segmentation",
    "keypoints": "keypoints",
}  # what a record needs to be compared
_TRUTH_FIELDS = ("area", "iscrowd", "bbox", "segmentation", "keypoints", "num_keypoints")


@dataclass(frozen=True)
class Curves:
    """T IoU thresholds, R recalls, K categories by ascending id, A areas, M limits of detections; -1 is "nothing".

    precision, scores: (T, R, K, A, M). recall: (T, K, A, M). stats: pycocotools' summary.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    scores: NDArray[np.float64]
    stats: NDArray[np.float64]


def default_engine(coco: Mapping[str, Any]) -> Engine:
    """The fastest that is installed; the reference for annotation ids that it has quirks for (0, or there twice)."""
    ids = {annotation["id"] for annotation in coco["annotations"]}
    odd = 0 in ids or len(ids) < len(coco["annotations"])
    return "hotcoco" if find_spec("hotcoco") and not odd else "pycocotools"


def curves(
    engine: Engine, coco: dict[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType
) -> Curves:
    """Of checked records; neither they nor their lists are changed. The order of `results` breaks ties of scores."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = (
            _hotcoco(coco, results, iou_type)
            if engine == "hotcoco"
            else _pycocotools(coco, results, iou_type)
        )
        run.evaluate()
        run.accumulate()
        run.summarize()
    arrays = (run.eval["precision"], run.eval["recall"], run.eval["scores"], run.stats)
    return Curves(*(np.asarray(array, np.float64) for array in arrays))


def _pycocotools(
    coco: dict[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType
) -> Any:
    truth = COCO()
    truth.dataset = coco | {"annotations": [dict(annotation) for annotation in coco["annotations"]]}
    truth.createIndex()
    if results:
        needed = ("image_id", "category_id", "score", "bbox", NEEDED[iou_type])
        return COCOeval(
            truth, truth.loadRes([_there(result, needed) for result in results]), iou_type
        )
    empty = COCO()
    empty.dataset = coco | {"annotations": []}
    empty.createIndex()
    return COCOeval(truth, empty, iou_type)


def _hotcoco(coco: dict[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType) -> Any:
    """Under ids that ascend from 1 in the same order: hotcoco takes no negative ones."""
    import hotcoco

    image = _numbered(record["id"] for record in coco["images"])
    category = _numbered(record["id"] for record in coco["categories"])
    images = {
        image[record["id"]]: {"id": image[record["id"]]} | _there(record, ("width", "height"))
        for record in coco["images"]
    }
    truth = {
        "images": list(images.values()),
        "categories": [{"id": number, "name": str(number)} for number in category.values()],
        "annotations": [
            {"id": number} | _placed(record, image, category) | _there(record, _TRUTH_FIELDS)
            for number, record in enumerate(coco["annotations"], 1)
            if record["image_id"] in image and record["category_id"] in category
        ],
    }
    ground = hotcoco.COCO(truth)
    if iou_type == "bbox":
        rows = (
            (image[r["image_id"]], *r["bbox"], r["score"], category[r["category_id"]])
            for r in results
        )
        found: Any = np.fromiter(rows, np.dtype((np.float64, 7)), len(results))
    else:
        needed = ("score", "bbox", NEEDED[iou_type])
        placed = (r for r in results if r["category_id"] in category)
        found = [_there(r, needed) | _placed(r, image, category) for r in placed]
    return hotcoco.COCOeval(ground, ground.load_res(found), iou_type)


def _numbered(ids: Any) -> dict[int, int]:
    return {key: number for number, key in enumerate(sorted(set(ids)), 1)}


def _placed(
    record: Mapping[str, Any], image: dict[int, int], category: dict[int, int]
) -> dict[str, int]:
    return {"image_id": image[record["image_id"]], "category_id": category[record["category_id"]]}


def _there(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: record[key] for key in keys if record.get(key) is not None}
