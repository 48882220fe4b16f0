"""COCO's precision and recall by pycocotools, the reference, or by hotcoco, which is faster.

Both give the same numbers to the bit: `tests/pipelines/evaluate/test_engines.py` compares
precision, recall, scores and statistics on random datasets. hotcoco is an optional dependency,
used where it is installed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from pipelines.coco.records import (
    CocoAnnotation,
    CocoCategory,
    CocoResult,
    JsonObject,
    JsonValue,
)
from pipelines.evaluate.boundary import BoundaryEval

Engine = Literal["pycocotools", "hotcoco"]
IouType = Literal["bbox", "segm", "keypoints"]
NEEDED: dict[IouType, str] = {  # the field that a result must have to be compared
    "bbox": "bbox",
    "segm": "segmentation",
    "keypoints": "keypoints",
}
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TruthImage:
    """height, width: as the file has them, if it has them. Only masks need them, and check them."""

    id: int
    height: JsonValue
    width: JsonValue

    def json(self, number: int) -> JsonObject:
        """The image under another id."""
        sides = {"width": self.width, "height": self.height}
        return {"id": number} | {name: side for name, side in sides.items() if side is not None}


@dataclass(frozen=True)
class Truth:
    """Ground truth of one evaluation, with what that evaluation compares and nothing more."""

    images: list[TruthImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]

    @property
    def num_keypoints(self) -> int:
        """Of each object, else of its category; COCO's number where neither has any."""
        of_objects = (len(annotation.keypoints) // 3 for annotation in self.annotations)
        named = (len(category.keypoints) for category in self.categories if category.keypoints)
        return next(of_objects, 0) or next(named, len(COCO_SIGMAS))


@dataclass(frozen=True)
class Curves:
    """T IoU thresholds, R recalls, K categories by ascending id, A areas, M limits of detections.

    precision, scores: (T, R, K, A, M). recall: (T, K, A, M). stats: pycocotools' summary. -1 is
    "nothing to evaluate".
    """

    precision: Floats
    recall: Floats
    scores: Floats
    stats: Floats


# How far people's own marks of each keypoint scatter, as a share of the object's scale (COCO's).
COCO_SIGMAS: tuple[float, ...] = tuple(Params("keypoints").kpt_oks_sigmas.tolist())


def sigmas_for(count: int, own: Sequence[float]) -> tuple[float, ...]:
    """The sigmas of OKS: the data's own, COCO's for its 17 points, else the mean of COCO's."""
    if own and len(own) != count:
        raise ValueError(f"{len(own)} sigmas for {count} keypoints; give one for each")
    if own:
        return tuple(own)
    if count == len(COCO_SIGMAS):
        return COCO_SIGMAS
    return (sum(COCO_SIGMAS) / len(COCO_SIGMAS),) * count


def default_engine(annotation_ids: Sequence[int]) -> Engine:
    """The fastest that is installed. pycocotools has quirks for id 0 and for an id that is there

    twice, so such data are left to it.
    """
    # pycocotools takes id 0 for "unmatched".
    distinct = set(annotation_ids)
    odd = 0 in distinct or len(distinct) < len(annotation_ids)
    return "hotcoco" if find_spec("hotcoco") and not odd else "pycocotools"


def curves(
    engine: Engine,
    truth: Truth,
    results: Sequence[CocoResult],
    iou_type: IouType,
    sigmas: Sequence[float] = COCO_SIGMAS,
    boundary: bool = False,
) -> Curves:
    """Compares checked records. The order of `results` breaks ties of scores.

    boundary: by the boundaries of masks, which pycocotools alone does.
    """
    return curves_of(evaluated(engine, truth, results, iou_type, sigmas, boundary))


def curves_of(run: COCOeval) -> Curves:
    """What the library makes of the detections that it has matched."""
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print as they go
        run.accumulate()
        run.summarize()
    assert run.eval is not None  # it is filled by `accumulate`
    arrays = (*(run.eval[name] for name in ("precision", "recall", "scores")), run.stats)
    return Curves(*(np.asarray(array, np.float64) for array in arrays))


def evaluated(
    engine: Engine,
    truth: Truth,
    results: Sequence[CocoResult],
    iou_type: IouType,
    sigmas: Sequence[float],
    boundary: bool,
) -> COCOeval:
    """The library's own object after it has matched detections with objects."""
    make = _hotcoco if engine == "hotcoco" and not boundary else _pycocotools
    with contextlib.redirect_stdout(io.StringIO()):
        run = make(truth, results, iou_type)
        if boundary:
            run = BoundaryEval(run.cocoGt, run.cocoDt, iou_type)
        if iou_type == "keypoints" and tuple(sigmas) != COCO_SIGMAS:
            run.params.kpt_oks_sigmas = np.asarray(sigmas)
        run.evaluate()
    return run


def _pycocotools(truth: Truth, results: Sequence[CocoResult], iou_type: IouType) -> COCOeval:
    ground = _coco(truth, truth.annotations)
    if results:
        detections = ground.loadRes([result.json() for result in results])
    else:
        detections = _coco(truth, [])  # loadRes fails on an empty list
    return COCOeval(ground, detections, iou_type)


def _coco(truth: Truth, annotations: Iterable[CocoAnnotation]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [image.json(image.id) for image in truth.images],
        "annotations": [annotation.json() for annotation in annotations],
        "categories": [{"id": category.id, "name": category.name} for category in truth.categories],
    }
    coco.createIndex()
    return coco


def _hotcoco(truth: Truth, results: Sequence[CocoResult], iou_type: IouType) -> COCOeval:
    """Under ids that ascend from 1 in the same order: hotcoco takes no negative ones."""
    import hotcoco

    image = _numbered(record.id for record in truth.images)
    category = _numbered(record.id for record in truth.categories)
    ground = hotcoco.COCO(
        {
            "images": [record.json(image[record.id]) for record in truth.images],
            "categories": [{"id": number, "name": str(number)} for number in category.values()],
            "annotations": [
                record.json() | {"id": number} | _placed(record, image, category)
                for number, record in enumerate(truth.annotations, 1)
                if record.image_id in image and record.category_id in category
            ],
        }
    )
    # Keypoint results may be of categories that have no keypoints; pycocotools leaves them out too.
    placed = [result for result in results if result.category_id in category]
    if iou_type == "bbox":  # as one array: half a million dictionaries would take most of the time
        rows = (
            (image[r.image_id], *(r.bbox or ()), r.score, category[r.category_id]) for r in placed
        )
        detections = ground.load_res(np.fromiter(rows, np.dtype((np.float64, 7)), len(placed)))
    else:
        detections = ground.load_res([r.json() | _placed(r, image, category) for r in placed])
    run: COCOeval = hotcoco.COCOeval(ground, detections, iou_type)  # it has the same attributes
    return run


def _numbered(ids: Iterable[int]) -> dict[int, int]:
    return {key: number for number, key in enumerate(sorted(set(ids)), 1)}


def _placed(
    record: CocoAnnotation | CocoResult, image: Mapping[int, int], category: Mapping[int, int]
) -> JsonObject:
    return {"image_id": image[record.image_id], "category_id": category[record.category_id]}
