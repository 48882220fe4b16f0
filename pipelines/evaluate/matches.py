"""Which detection matched what in each image: all that AP on other samples of the images needs.

Axes: D detections, T IoU thresholds, K categories by ascending id, I images by ascending id.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from pipelines.coco.collector import collector_paused
from pipelines.evaluate.engines import IouType, curves_of, evaluated
from pipelines.evaluate.evaluation import Evaluation, compared, evaluation_of
from pipelines.shards.dataset import Dataset


class Matches(NamedTuple):
    """The arrays of `contract.attempt.MATCHES`, under the names that they have in the file."""

    category: NDArray[np.int32]
    image: NDArray[np.int32]
    matched: NDArray[np.uint16]
    ignored: NDArray[np.uint16]
    objects: NDArray[np.int32]  # (K, I)
    image_ids: NDArray[np.int64]

    def file(self) -> bytes:
        """The bytes of an .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self._asdict())
        return buffer.getvalue()


@collector_paused()
def evaluate_and_match(
    truth: Dataset | Path,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType,
    boundary: bool = False,
) -> tuple[Evaluation, Matches]:
    """As `evaluate`, with the matches; both are of one comparison, by pycocotools."""
    known, ordered, sigmas = compared(truth, results, iou_type)
    run = evaluated("pycocotools", known, ordered, iou_type, sigmas, boundary)
    return evaluation_of(curves_of(run), known, ordered, iou_type), _matches(run)


def _matches(run: COCOeval) -> Matches:
    """Over all sizes, in pycocotools' order: by category, then the best score first."""
    num_images, num_categories = len(run.params.imgIds), len(run.params.catIds)
    sizes = len(run.params.areaRng)
    bits = 1 << np.arange(len(run.params.iouThrs))
    objects = np.zeros((num_categories, num_images), np.int32)
    parts: list[tuple[Any, ...]] = []
    for k in range(num_categories):
        of_category: list[tuple[Any, ...]] = []
        for i in range(num_images):
            one = run.evalImgs[(k * sizes) * num_images + i]  # the first size is "all"
            if one is None:
                continue
            objects[k, i] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
            scores = np.asarray(one["dtScores"], np.float64)
            matched = bits @ (np.asarray(one["dtMatches"]).reshape(len(bits), -1) > 0)
            ignored = bits @ (np.asarray(one["dtIgnore"]).reshape(len(bits), -1) > 0)
            of_category.append((np.full(len(scores), i), scores, matched, ignored))
        if of_category:
            images, scores, matched, ignored = map(np.concatenate, zip(*of_category, strict=True))
            # Stable, as pycocotools sorts: equal scores keep the order of the images.
            best = np.argsort(-scores, kind="mergesort")
            category = np.full(len(best), k)
            parts.append((category, images[best], matched[best], ignored[best]))
    if not parts:
        parts = [(np.zeros(0),) * 4]
    category, image, matched, ignored = map(np.concatenate, zip(*parts, strict=True))
    return Matches(
        category.astype(np.int32),
        image.astype(np.int32),
        matched.astype(np.uint16),
        ignored.astype(np.uint16),
        objects,
        np.asarray(run.params.imgIds, np.int64),
    )
