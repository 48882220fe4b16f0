"""What a report knows beyond the metrics: how long each arm trained, and what its numbers mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.answers import StudyView, TrialView
from contract.study import Study
from orchestrator.results.comparison import Folders
from orchestrator.results.soundness import Course
from orchestrator.results.trial_files import (
    SeenResult,
    SeenRun,
    read_histories,
    read_result,
    read_spec,
    seen,
)
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.contrasts import parse_arm, primary_of
from orchestrator.study.expand import VAL_IMAGES_TAG
from orchestrator.study.paper import PaperRow, paper_tables

# The shortest recipe among the paper's own main tables: ResNeXt, 160,000 steps of 8 images.
MIN_IMAGES_FOR_PAPER = 1_280_000
PAPER_VAL_IMAGES = 5_000  # of val2017
PAPER_SHORT_SIDE_PX = 800

ArmKey = tuple[tuple[str, str], ...]  # (factor, level) in the study's order


@dataclass(frozen=True)
class TrialFacts:
    """One trial's folder as far as it can be read; defaults where it cannot.

    histories: metric -> (step, value) of each evaluation.
    """

    run: SeenRun
    tags: Mapping[str, str]
    result: SeenResult
    histories: Mapping[str, tuple[tuple[int, float], ...]]


@dataclass(frozen=True)
class Facts:
    """machinery_only, no_paper: why there is no verdict, no paper column; empty where there is one.

    precision: in which the finished trials computed; empty before there is one. trials: trial id ->
    its folder. papers: arm -> row, for the arms that the study assigns one.
    scope: on what the numbers are, in words: they say nothing about anything else.
    """

    study: Study
    trials: Mapping[str, TrialFacts]
    machinery_only: str
    no_paper: str
    papers: Mapping[ArmKey, PaperRow]
    precision: str
    scope: str
    primary: str
    folders: Folders


def gather(view: StudyView) -> Facts:
    """Reads the trials' folders; a folder that is gone or still empty leaves gaps, not errors."""
    study = Study.model_validate(view.spec)
    machinery = _machinery_only(study)
    primary = primary_of(study, {metric for trial in view.trials for metric in trial.metrics})
    facts = {trial.trial: _trial_facts(trial, study, primary) for trial in view.trials}
    folders = Folders(
        {trial.trial: _course(facts[trial.trial], primary) for trial in view.trials},
        {name: known.result.weights_sha256 for name, known in facts.items()},
    )
    return Facts(
        study,
        facts,
        machinery,
        _no_paper(study, machinery, view.trials, facts),
        _paper_rows(study, view.trials),
        _precision(view.trials, facts),
        _scope(study, list(facts.values())),
        primary,
        folders,
    )


def arm_key(arm: Mapping[str, str]) -> ArmKey:
    """`arm` as the key of a mapping."""
    return tuple(arm.items())


def _trial_facts(trial: TrialView, study: Study, primary: str) -> TrialFacts:
    result = read_result(trial)
    spec = read_spec(trial, result)
    run = spec.run or _run_of(study, trial)
    metrics = list(dict.fromkeys([primary, *study.metrics]))
    # A run that is evaluated at its end alone has no history to read.
    histories = read_histories(trial, metrics) if run.eval_every_steps else {}
    return TrialFacts(run, spec.tags, result, histories)


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


def _machinery_only(study: Study) -> str:
    if len(study.every_seed) > 1:
        return ""
    return "one seed: this shows that the machinery works, it is no evidence about the arms"


def _scope(study: Study, facts: Sequence[TrialFacts]) -> str:
    """On what the numbers are: images, schedule, preset. What is not known is left out."""
    parts = []
    tags = {known.tags.get(VAL_IMAGES_TAG, "") for known in facts}
    images = sorted(int(tag) for tag in tags if re.fullmatch("[0-9]{1,9}", tag))
    if images:
        names = {Path(known.run.val).parent.name for known in facts if known.run.val}
        of = f" of {names.pop()}" if len(names) == 1 and "" not in names else ""
        parts.append(f"these {_range(images)} validation images{of}")
    steps = sorted({known.run.steps for known in facts} - {0})
    if steps:
        parts.append(f"{_range(steps)} steps")
    parts.append(study.baseline.preset or study.baseline.file)
    return ", ".join(filter(None, parts))


def _range(numbers: Sequence[int]) -> str:
    low, high = f"{numbers[0]:,}", f"{numbers[-1]:,}"
    return low if low == high else f"{low} to {high}"


def _course(known: TrialFacts, primary: str) -> Course:
    run = known.run
    history = known.histories.get(primary, ())
    return Course(run.steps, known.result.step, run.eval_every_steps, history)


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
        wanted = parse_arm(text, study.factors, "paper_rows").items()
        for trial in trials:
            if wanted <= trial.arm.items():
                rows[arm_key(trial.arm)] = published.row(name)
    return rows
