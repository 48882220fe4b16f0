"""The noise of a small validation set: AP of resampled images, and of resampled seeds with them.

Pure functions on the matches of single detections. Axes: D detections of a category, T IoU
thresholds, I images, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.results.statistics.summary import CONFIDENCE

RESAMPLES = 300
NUM_THRESHOLDS = 10
_RECALLS = np.linspace(0.0, 1.0, 101)
# pycocotools' thresholds 0.5, 0.55, ... by the statistic that means over them
THRESHOLDS: Mapping[str, Sequence[int]] = {"AP": range(NUM_THRESHOLDS), "AP50": [0], "AP75": [5]}
_GENERATOR = 1  # fixed: two reports of one study show the same digits

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Matched:
    """The arrays of `contract.attempt.MATCHES`."""

    category: NDArray[np.int32]
    image: NDArray[np.int32]
    matched: NDArray[np.uint16]
    ignored: NDArray[np.uint16]
    objects: NDArray[np.int32]
    image_ids: NDArray[np.int64]


def average_precision(
    found: Matched, thresholds: Sequence[int], counts_I: NDArray[np.int64]
) -> float:
    """pycocotools' AP with each image `counts_I` times in the set; -1 without an object."""
    values: list[float] = []
    starts = np.searchsorted(found.category, np.arange(len(found.objects) + 1))
    for k, objects_I in enumerate(found.objects):
        total = int(objects_I @ counts_I)
        if not total:
            continue
        part = slice(starts[k], starts[k + 1])
        weight_D = counts_I[found.image[part]]
        for threshold in thresholds:
            bit = np.uint16(1 << threshold)
            counts = (found.ignored[part] & bit) == 0
            hit = (found.matched[part] & bit) != 0
            values.append(_area(hit & counts, ~hit & counts, weight_D, total))
    return float(np.mean(values)) if values else -1.0


def _area(
    hit_D: NDArray[np.bool_], miss_D: NDArray[np.bool_], weight_D: NDArray[np.int64], total: int
) -> float:
    """The mean precision at 101 recalls."""
    hits, misses = np.cumsum(hit_D * weight_D), np.cumsum(miss_D * weight_D)
    recall = hits / total
    precision = hits / np.maximum(hits + misses, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(envelope, 0.0)[place].mean())


def resampled_counts(num_images: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """(B, I): how often each image is in each resample."""
    generator = np.random.default_rng(_GENERATOR)
    share = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, share, size=resamples)


def two_way(
    weights: Mapping[str, float],
    by_seed: Mapping[str, Mapping[int, Floats]],
    trainings: Mapping[str, str],
) -> tuple[float, float]:
    """The 95% interval of a contrast over resampled seeds and, the same for all arms, images.

    by_seed: arm -> seed -> the metric of every resample of images (B). trainings: arm -> the
    training that it shares with others: their seeds are drawn together. NaN if they share none.
    """
    generator = np.random.default_rng(_GENERATOR)
    total: Floats | float = 0.0
    drawn: dict[str, NDArray[np.int64]] = {}
    for arm, weight in weights.items():
        training = trainings.get(arm, arm)
        together = [by_seed[one] for one in weights if trainings.get(one, one) == training]
        seeds = sorted(set.intersection(*map(set, together)))
        if not seeds:
            return math.nan, math.nan
        table = np.stack([by_seed[arm][seed] for seed in seeds])  # seeds, B
        if training not in drawn:
            drawn[training] = generator.integers(0, len(table), size=table.shape)
        chosen = np.take_along_axis(table, drawn[training], axis=0)
        total = total + weight * chosen.mean(axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(total), [tail, 1 - tail])
    return float(low), float(high)
