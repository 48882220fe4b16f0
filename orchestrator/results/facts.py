"""What a report knows beyond the metrics: how long each arm trained, and what its numbers mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.answers import StudyView, TrialView
from contract.study import Study
from orchestrator.results.trial_files import SeenResult, SeenRun, read_result, read_spec, seen
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.expand import VAL_IMAGES_TAG
from orchestrator.study.paper import PaperRow, paper_tables
from orchestrator.study.read import parse_arm

# Images that a trial has to see before its numbers say anything about an arm: about one epoch of
# COCO.
MIN_IMAGES_FOR_VERDICT = 100_000
# The shortest recipe among the paper's own main tables: ResNeXt, 160,000 steps of 8 images.
MIN_IMAGES_FOR_PAPER = 1_280_000
PAPER_VAL_IMAGES = 5_000  # of val2017
PAPER_SHORT_SIDE_PX = 800

ArmKey = tuple[tuple[str, str], ...]  # (factor, level) in the study's order


@dataclass(frozen=True)
class TrialFacts:
    """One trial's folder as far as it can be read; defaults where it cannot."""

    run: SeenRun
    tags: Mapping[str, str]
    result: SeenResult


@dataclass(frozen=True)
class Facts:
    """machinery_only, no_paper: why there is no verdict, no paper column; empty where there is one.

    precision: in which the finished trials computed; empty before there is one. trials: trial id ->
    its folder. papers: arm -> row, for the arms that the study assigns one.
    """

    study: Study
    trials: Mapping[str, TrialFacts]
    machinery_only: str
    no_paper: str
    papers: Mapping[ArmKey, PaperRow]
    precision: str


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
        _precision(view.trials, facts),
    )


def arm_key(arm: Mapping[str, str]) -> ArmKey:
    """`arm` as the key of a mapping."""
    return tuple(arm.items())


def _trial_facts(trial: TrialView, study: Study) -> TrialFacts:
    result = read_result(trial)
    spec = read_spec(trial, result)
    return TrialFacts(spec.run or _run_of(study, trial), spec.tags, result)


def _run_of(study: Study, trial: TrialView) -> SeenRun:
    """The arm's run from the study alone, where it starts from a preset."""
    # A trial that waits has no spec in its folder, and the report is made while the study runs.
    if not study.baseline.preset:
        return SeenRun()  # the run file is on the submitter's machine
    overrides = {
        path: value
        for factor, level in trial.arm.items()
        for path, value in study.factors.get(factor, {}).get(level, {}).items()
    }
    try:
        return seen(SeenRun, BaselineRun.of(study, Path()).arm(overrides, trial.key))
    except ValueError:
        return SeenRun()  # the study's own code has a field that this code does not know


def _precision(trials: Sequence[TrialView], facts: Mapping[str, TrialFacts]) -> str:
    """ "fp32 (convolutions in TF32)"; with the number of trials for each where they differ."""
    known = [facts[trial.trial] for trial in trials if trial.state == "done"]
    counts = Counter(one.result.precision or one.run.precision or "not known" for one in known)
    if len(counts) <= 1:
        return "".join(counts)
    parts = (f"{count} trials in {precision}" for precision, count in counts.most_common())
    return f"{', '.join(parts)}: a difference between arms may be one of precision"


def _machinery_only(
    study: Study, trials: Sequence[TrialView], facts: Mapping[str, TrialFacts]
) -> str:
    reasons = []
    if len(study.seeds) == 1:
        reasons.append("one seed")
    images = [facts[trial.trial].run.images for trial in trials]
    if images and min(images) == 0:
        reasons.append("a training length that is not known")
    elif images and min(images) < MIN_IMAGES_FOR_VERDICT:
        reasons.append(
            f"a short schedule ({min(images):,} training images, under {MIN_IMAGES_FOR_VERDICT:,})"
        )
    if not reasons:
        return ""
    return (
        f"{' and '.join(reasons)}: this shows that the machinery works, "
        "it is no evidence about the arms"
    )


def _no_paper(
    study: Study, machinery: str, trials: Sequence[TrialView], facts: Mapping[str, TrialFacts]
) -> str:
    """Why there is no paper column. One trial is enough: the column is for all of them."""
    if not study.paper_table:
        return "the study names no table of the paper"
    if machinery:
        return machinery.partition(":")[0]
    reasons = (_unlike_the_paper(trial, facts[trial.trial]) for trial in trials)
    return next(filter(None, reasons), "")


def _unlike_the_paper(trial: TrialView, known: TrialFacts) -> str:
    """In what the trial differs from the paper's training or validation; empty if in nothing."""
    if known.run.images < MIN_IMAGES_FOR_PAPER:
        return (
            f"{trial.key} trained on {known.run.images:,} images, "
            f"the paper's shortest recipe on {MIN_IMAGES_FOR_PAPER:,}"
        )
    side = known.run.short_side_px
    if side != PAPER_SHORT_SIDE_PX:
        return f"{trial.key} is tested at {side} px, the paper at {PAPER_SHORT_SIDE_PX}"
    images = known.tags.get(VAL_IMAGES_TAG, "")
    if images != str(PAPER_VAL_IMAGES):
        size = f"has {images} images" if images else "is not known"
        return (
            f"the validation set of {trial.key} {size}, the paper's has {PAPER_VAL_IMAGES:,} images"
        )
    return ""


def _paper_rows(study: Study, trials: Sequence[TrialView]) -> dict[ArmKey, PaperRow]:
    """The paper's row of each arm. An entry that leaves factors out holds for all their levels."""
    if not study.paper_table:
        return {}
    published = paper_tables()[study.paper_table]
    rows: dict[ArmKey, PaperRow] = {}
    for text, name in study.paper_rows.items():
        wanted = parse_arm(text, study).items()
        for trial in trials:
            if wanted <= trial.arm.items():
                rows[arm_key(trial.arm)] = published.row(name)
    return rows
