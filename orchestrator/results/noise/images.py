"""Beside a contrast's interval over seeds: the one over seeds and validation images."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from contract.answers import StudyView, TrialView
from contract.attempt import MATCHES, MAX_IMAGES_OF_MATCHES
from contract.files import uri_join
from contract.words import one_line
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.media import artifact
from orchestrator.results.noise.bootstrap import (
    RESAMPLES,
    THRESHOLDS,
    Floats,
    Matched,
    average_precision,
    image_error,
    resampled_counts,
    with_error,
)
from orchestrator.study.contrasts import arm_name
from orchestrator.trial_folder import SMALL_BYTES, TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")
_MOST_BYTES = 2**28  # of one trial's arrays, unpacked
_KEPT = TypeAdapter(dict[str, tuple[FiniteFloat, FiniteFloat]])


@dataclass(frozen=True)
class _Resampled:
    """values: the metric of each resample of the images with these ids."""

    image_ids: bytes
    values: Floats


_Intervals = dict[str, tuple[float, float]]
_Behind = dict[str, dict[int, TrialView]]  # arm -> seed -> a trial that the estimate rests on
_Known = dict[tuple[str, str], _Resampled | None]  # (trial id, metric) -> what was made of it


def with_images(view: StudyView, facts: Facts, comparison: Comparison) -> _Intervals:
    """Contrast's name -> its interval, where trials left their matches: of small validation sets.

    As fractions. It takes seconds a trial, so the intervals are kept beside the study's report.
    """
    asked = [
        (answer, behind)
        for answer in comparison.answers
        if answer.verdict and _left_matches(facts, answer, behind := _behind(answer, comparison))
    ]
    if not asked:
        return {}
    name = f"report/images-{_digest(facts, asked)}.json"
    folder = TrialFolder(uri_join(view.storage, view.study)) if view.storage else None
    kept = _read_kept(folder, name) if folder is not None else None
    if kept is not None:
        return kept
    known: _Known = {}
    intervals: _Intervals = {}
    for answer, behind in asked:
        by_seed = _by_seed(facts, answer.asked.metric, behind, known)
        if by_seed:
            error = image_error(answer.asked.weights, by_seed)
            low, high = with_error(answer.estimate, error)
            if not math.isnan(low):
                intervals[answer.asked.name] = low, high
    if folder is not None:
        try:
            folder.write(name, _KEPT.dump_json(intervals))
        except (OSError, TrialFileError) as error:
            LOG.warning("%s; computed anew for the next report", one_line(error))
    return intervals


def _behind(answer: Answer, comparison: Comparison) -> _Behind:
    """The trials that the estimate rests on: those of a first verdict, or all with a number."""
    behind: _Behind = {}
    for arm in comparison.arms:
        name, summary = arm_name(arm.arm), arm.metrics.get(answer.asked.metric)
        if name not in answer.asked.weights or summary is None:
            continue
        first = None if answer.first is None else answer.first.trials[name]
        behind[name] = {
            trial.seed: trial
            for trial in arm.trials
            if trial.state == "done"
            and trial.seed in summary.by_seed
            and (first is None or trial.identity in first)
        }
    return behind


def _left_matches(facts: Facts, answer: Answer, behind: _Behind) -> bool:
    """Whether every trial names a file of matches: what it holds is seen later."""
    kind, _, statistic = answer.asked.metric.partition("/")
    name = MATCHES.format(kind=kind)
    trials = [trial for by_seed in behind.values() for trial in by_seed.values()]
    return (
        statistic in THRESHOLDS
        and len(behind) == len(answer.asked.weights)
        and all(behind.values())
        and all(name in facts.trials[trial.trial].result.artifacts for trial in trials)
    )


def _digest(facts: Facts, asked: Sequence[tuple[Answer, _Behind]]) -> str:
    """Of all that the intervals follow from."""
    rests_on = [
        (
            answer.asked.name,
            answer.asked.metric,
            dict(answer.asked.weights),
            (answer.estimate.low, answer.estimate.high),
            [
                (arm, seed, trial.trial, facts.trials[trial.trial].result.attempt)
                for arm, by_seed in behind.items()
                for seed, trial in by_seed.items()
            ],
        )
        for answer, behind in asked
    ]
    text = json.dumps(["sum of variances", RESAMPLES, rests_on])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_kept(folder: TrialFolder, name: str) -> _Intervals | None:
    """What an earlier report left; None if nothing, or something else."""
    try:
        value = folder.json(name, SMALL_BYTES)
        return None if value is None else _KEPT.validate_python(value)
    except (OSError, TrialFileError, ValidationError) as error:
        LOG.warning("%s; computed anew", one_line(error))
        return None


def _by_seed(
    facts: Facts, metric: str, behind: _Behind, known: _Known
) -> Mapping[str, Sequence[Floats]]:
    """Arm -> of each seed the resampled metric; empty where one of them is not known."""
    tables: dict[str, list[Floats]] = {}
    images = set()
    for arm, by_seed in behind.items():
        for trial in by_seed.values():
            if (trial.trial, metric) not in known:
                known[trial.trial, metric] = _resampled(facts, trial, metric)
            one = known[trial.trial, metric]
            if one is None:
                return {}
            images.add(one.image_ids)
            tables.setdefault(arm, []).append(one.values)
    # Arms on different images share no resample.
    return tables if len(images) == 1 else {}


def _resampled(facts: Facts, trial: TrialView, metric: str) -> _Resampled | None:
    kind, _, statistic = metric.partition("/")
    raw = artifact(facts, trial, MATCHES.format(kind=kind))
    found = None if raw is None else _read(raw)
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
