"""The noise of a small validation set: AP of resampled images, and intervals that know of it.

Pure functions on the matches of single detections. Axes: D detections of a category, T IoU
thresholds, I images, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.results.statistics.contrasts import Estimate

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


def image_error(weights: Mapping[str, float], by_seed: Mapping[str, Sequence[Floats]]) -> float:
    """The standard error of a contrast for want of images, with these seeds.

    by_seed: arm -> of each seed the metric of every resample of images (B), which are the same for
    all arms.
    """
    means = (weight * np.mean(by_seed[arm], axis=0) for arm, weight in weights.items())
    return float(np.std(sum(means), ddof=1))


def with_error(estimate: Estimate, error: float) -> tuple[float, float]:
    """The estimate's interval, widened by another source of noise. NaN where it has none."""
    half = estimate.quantile * math.hypot(estimate.error, error)
    return estimate.difference - half, estimate.difference + half
