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
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            found = Matched(*(arrays[field.name] for field in fields(Matched)))
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return found if 0 < len(found.image_ids) <= MAX_IMAGES_OF_MATCHES else None
