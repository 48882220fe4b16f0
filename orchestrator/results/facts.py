"""What a report knows beyond the metrics: how long each arm trained, and what its numbers may be compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract.answers import StudyView, TrialView
from contract.attempt import RESULT_FILE, SPEC_FILE
from contract.recipe import apply_overrides
from contract.study import Study
from orchestrator.settings import service_files
from orchestrator.study.read import baseline_run, paper_tables, parse_arm

# Images that a trial has to see before its numbers say anything about an arm: about one epoch of COCO.
MIN_IMAGES_FOR_VERDICT = 100_000
# The shortest recipe among the paper's own main tables: ResNeXt, 160,000 steps of 8 images.
MIN_IMAGES_FOR_PAPER = 1_280_000
PAPER_VAL_IMAGES = 5_000
PAPER_SHORT_SIDE_PX = 800


@dataclass(frozen=True)
class TrialFacts:
    """One trial's folder as far as it can be read; empty where it cannot."""

    run: dict[str, Any]
    tags: dict[str, str]
    result: dict[str, Any]


@dataclass(frozen=True)
class PaperRow:
    """One arm's row of the paper: metric name -> AP as a fraction.

    A row called "difference" was published as a gain over the baseline arm: then `metrics` is empty.
    """

    name: str
    metrics: dict[str, float]
    gains: dict[str, float]


@dataclass(frozen=True)
class Facts:
    """machinery_only, no_paper: why there is no verdict, no paper column; empty where there is one.

    papers: arm name -> row, for the arms that the study assigns one.
    """

    study: Study
    trials: dict[str, TrialFacts]
    machinery_only: str
    no_paper: str
    papers: dict[tuple[tuple[str, str], ...], PaperRow]


def gather(view: StudyView) -> Facts:
    """Reads the trials' folders; a folder that is gone or still empty leaves gaps, not errors."""
    study = Study.model_validate(view.spec)
    facts = {trial.trial: _trial_facts(trial, study) for trial in view.trials}
    machinery = _machinery_only(study, view.trials, facts)
    return Facts(
        study,
        facts,
        machinery,
        _no_paper(study, machinery, view.trials, facts),
        _paper_rows(study, view.trials),
    )


def images_seen(run: Mapping[str, Any]) -> int:
    """Training images of a whole run, repetitions counted; 0 if the run is not known."""
    loop = run.get("loop", {})
    return int(loop.get("steps", 0)) * int(loop.get("global_batch", 0))


def _trial_facts(trial: TrialView, study: Study) -> TrialFacts:
    spec: dict[str, Any] = {}
    result: dict[str, Any] = {}
    if trial.storage:
        files = service_files(trial.storage)
        result = files.read_object(RESULT_FILE) or {}
        attempt = int(result.get("attempt", 0)) or max(trial.attempts, 1)
        spec = files.read_object(SPEC_FILE.format(attempt=attempt)) or {}
    return TrialFacts(spec.get("run") or _run_of(study, trial), spec.get("tags", {}), result)


def _run_of(study: Study, trial: TrialView) -> dict[str, Any]:
    """The arm's run from the study alone, where it starts from a preset."""
    if not study.baseline.preset:
        return {}
    run = baseline_run(study, Path())
    for factor, level in trial.arm.items():
        run = apply_overrides(run, study.factors.get(factor, {}).get(level, {}))
    return run


def _machinery_only(
    study: Study, trials: Sequence[TrialView], facts: Mapping[str, TrialFacts]
) -> str:
    reasons = []
    if len(study.seeds) == 1:
        reasons.append("one seed")
    seen = [images_seen(facts[trial.trial].run) for trial in trials]
    if seen and min(seen) == 0:
        reasons.append("a training length that is not known")
    elif seen and min(seen) < MIN_IMAGES_FOR_VERDICT:
        reasons.append(
            f"a short schedule ({min(seen):,} training images, under {MIN_IMAGES_FOR_VERDICT:,})"
        )
    if not reasons:
        return ""
    return f"{' and '.join(reasons)}: this shows that the machinery works, it is no evidence about the arms"


def _no_paper(
    study: Study, machinery: str, trials: Sequence[TrialView], facts: Mapping[str, TrialFacts]
) -> str:
    if not study.paper_table:
        return "the study names no table of the paper"
    if machinery:
        return machinery.partition(":")[0]
    for trial in trials:
        known = facts[trial.trial]
        seen = images_seen(known.run)
        if seen < MIN_IMAGES_FOR_PAPER:
            return f"{trial.key} trained on {seen:,} images, the paper's shortest recipe on {MIN_IMAGES_FOR_PAPER:,}"
        side = known.run["model"]["image"]["short_side_px"]
        if side != PAPER_SHORT_SIDE_PX:
            return f"{trial.key} is tested at {side} px, the paper at {PAPER_SHORT_SIDE_PX}"
        images = known.tags.get("maskray.val_images", "")
        if images != str(PAPER_VAL_IMAGES):
            found = f"has {images} images" if images else "is not known"
            return f"the validation set of {trial.key} {found}, the paper's has {PAPER_VAL_IMAGES:,} images"
    return ""


# --- the paper's rows -----------------------------------------------------------------------------------------------

_STATS = {"APS": "APs", "APM": "APm", "APL": "APl"}  # the paper's capitals -> ours


def _paper_rows(
    study: Study, trials: Sequence[TrialView]
) -> dict[tuple[tuple[str, str], ...], PaperRow]:
    if not study.paper_table:
        return {}
    table = paper_tables()[study.paper_table]
    rows: dict[tuple[tuple[str, str], ...], PaperRow] = {}
    for text, name in study.paper_rows.items():
        wanted = parse_arm(text, study).items()
        for trial in trials:
            if wanted <= trial.arm.items():
                values = paper_metrics(table, name)
                row = (
                    PaperRow(name, {}, values)
                    if name == "difference"
                    else PaperRow(name, values, {})
                )
                rows[tuple(trial.arm.items())] = row
    return rows


def paper_metrics(table: Mapping[str, Any], row: str) -> dict[str, float]:
    """One published row under our metric names, as fractions. Its columns are "AP" of one metric, or "segm AP"."""
    published = table["rows"][row]
    if isinstance(published, Mapping):  # metric -> values
        parts = [(metric, table["columns"], values) for metric, values in published.items()]
    else:
        parts = [(table.get("metric", ""), table["columns"], published)]
    found: dict[str, float] = {}
    for metric, columns, values in parts:
        for column, value in zip(columns, values, strict=True):
            group, _, stat = f"{metric} {column}".strip().partition(" ")
            if value is not None and math.isfinite(value):
                found[f"{group}/{_STATS.get(stat, stat)}"] = value / 100
    return found
