"""Beside a contrast's interval over seeds: the one over seeds and validation images."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from contract.answers import TrialView
from contract.attempt import MATCHES, MAX_IMAGES_OF_MATCHES
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.media import artifact
from orchestrator.results.noise.bootstrap import (
    THRESHOLDS,
    Floats,
    Matched,
    average_precision,
    resampled_counts,
    two_way,
)
from orchestrator.study.contrasts import arm_name


@dataclass(frozen=True)
class _Resampled:
    """values: the metric of each resample of the images with these ids."""

    image_ids: bytes
    values: Floats


_MOST_BYTES = 2**28  # of one trial's arrays, unpacked
_Known = dict[tuple[str, str], _Resampled | None]  # (trial id, metric) -> what was made of it


def with_images(facts: Facts, comparison: Comparison) -> dict[str, tuple[float, float]]:
    """Contrast's name -> its interval, where trials left their matches: of small validation sets.

    As fractions.
    """
    known: _Known = {}
    intervals = {}
    for answer in comparison.answers:
        by_trial = _by_trial(facts, comparison, answer, known)
        if by_trial:
            intervals[answer.asked.name] = two_way(answer.asked.weights, by_trial)
    return intervals


def _by_trial(
    facts: Facts, comparison: Comparison, answer: Answer, known: _Known
) -> Mapping[str, Sequence[Floats]]:
    """Arm -> the resampled metric of each seed; empty where one of them is not known."""
    weights, metric = answer.asked.weights, answer.asked.metric
    tables: dict[str, list[Floats]] = {}
    images = set()
    for arm in comparison.arms:
        done = [trial for trial in arm.trials if trial.state == "done"]
        for trial in done if weights.get(arm_name(arm.arm)) else ():
            if (trial.trial, metric) not in known:
                known[trial.trial, metric] = _resampled(facts, trial, metric)
            one = known[trial.trial, metric]
            if one is None:
                return {}
            images.add(one.image_ids)
            tables.setdefault(arm_name(arm.arm), []).append(one.values)
    # Arms on different images share no resample.
    return tables if len(images) == 1 and len(tables) == len(weights) else {}


def _resampled(facts: Facts, trial: TrialView, metric: str) -> _Resampled | None:
    kind, _, statistic = metric.partition("/")
    raw = artifact(facts, trial, MATCHES.format(kind=kind))
    if statistic not in THRESHOLDS or raw is None:
        return None
    found = _read(raw)
    if found is None:
        return None
    counts = resampled_counts(len(found.image_ids))
    values = [average_precision(found, THRESHOLDS[statistic], one) for one in counts]
    return _Resampled(found.image_ids.tobytes(), np.array(values))


def _read(raw: bytes) -> Matched | None:
    """None for a file of another form: it must not cost a study its report."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            # A small file can unpack to any size.
            if sum(member.file_size for member in file.infolist()) > _MOST_BYTES:
                return None
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            found = Matched(*(arrays[field.name] for field in fields(Matched)))
    except (EOFError, OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile):
        return None
    return found if _is_whole(found) else None


def _is_whole(found: Matched) -> bool:
    """Whether the arrays point at each other's places, and nowhere else."""
    arrays = vars(found)
    shapes = {arrays[name].shape for name in ("category", "image", "matched", "ignored")}
    if any(array.dtype.kind not in "iu" for array in arrays.values()) or len(shapes) != 1:
        return False
    if found.objects.ndim != 2 or found.category.ndim != 1:
        return False
    num_categories, num_images = found.objects.shape
    if found.image_ids.shape != (num_images,) or not 0 < num_images <= MAX_IMAGES_OF_MATCHES:
        return False
    sorted_ = bool((np.diff(found.category) >= 0).all())
    inside = all(
        not len(places) or (places.min() >= 0 and places.max() < most)
        for places, most in ((found.category, num_categories), (found.image, num_images))
    )
    return sorted_ and inside
