"""What a report knows beyond the metrics: how long each arm trained, and what its numbers mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.answers import StudyView, TrialView
from contract.recipe import RunConfig, parse_run
from contract.study import Study
from orchestrator.results.comparison import Folders
from orchestrator.results.published.beside import Earned, Trained, earned
from orchestrator.results.soundness import Course
from orchestrator.results.trial_files import (
    SeenResult,
    SeenRun,
    SeenSpec,
    read_histories,
    read_result,
    read_spec,
    seen,
)
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.contrasts import arm_name, primary_of
from orchestrator.study.expand import TRAIN_IMAGES_TAG, VAL_IMAGES_TAG
from orchestrator.study.paper import BASELINE_ROW, PaperRow, rows_of


@dataclass(frozen=True)
class TrialFacts:
    """One trial's folder as far as it can be read; defaults where it cannot.

    histories: metric -> (step, value) of each evaluation. trained: the same run as a whole record,
    for the paper's rows.
    """

    run: SeenRun
    tags: Mapping[str, str]
    result: SeenResult
    histories: Mapping[str, tuple[tuple[int, float], ...]]
    trained: Trained


@dataclass(frozen=True)
class Facts:
    """machinery_only, no_paper: why there is no verdict, no paper column; empty where there is one.

    precision: in which the finished trials computed; empty before there is one. trials: trial id ->
    its folder. papers: arm's name -> row, for the arms that the study assigns one. earned: what the
    records of those arms earn beside the paper.
    scope: on what the numbers are, in words: they say nothing about anything else.
    """

    study: Study
    trials: Mapping[str, TrialFacts]
    machinery_only: str
    no_paper: str
    papers: Mapping[str, PaperRow]
    earned: Earned
    precision: str
    scope: str
    primary: str
    folders: Folders


def gather(view: StudyView) -> Facts:
    """Reads the trials' folders; a folder that is gone or still empty leaves gaps, not errors."""
    study = Study.model_validate(view.spec)
    machinery = _machinery_only(study)
    primary = primary_of(study, {metric for trial in view.trials for metric in trial.metrics})
    base = _base(study)
    facts = {trial.trial: _trial_facts(trial, study, base, primary) for trial in view.trials}
    papers = rows_of(study, [trial.arm for trial in view.trials]) if study.paper_table else {}
    earns = _earned(study, view.trials, facts, papers)
    folders = Folders(
        {trial.trial: _course(facts[trial.trial], primary) for trial in view.trials},
        {name: known.result.weights_sha256 for name, known in facts.items()},
    )
    return Facts(
        study,
        facts,
        machinery,
        _no_paper(study, machinery, earns),
        papers,
        earns,
        _precision(view.trials, facts),
        _scope(study, list(facts.values())),
        primary,
        folders,
    )


def _trial_facts(
    trial: TrialView, study: Study, base: BaselineRun | None, primary: str
) -> TrialFacts:
    result = read_result(trial)
    spec = read_spec(trial, result)
    if spec.run is not None:
        run, trained = spec.run, _trained(trial, spec)
    else:
        known = _run_of(study, base, trial)
        run = seen(SeenRun, known) if known else SeenRun()
        trained = Trained(trial.key, known, unread="its folder is gone or still empty")
    metrics = list(dict.fromkeys([primary, *study.metrics]))
    # A run that is evaluated at its end alone has no history to read.
    histories = read_histories(trial, metrics) if run.eval_every_steps else {}
    return TrialFacts(run, spec.tags, result, histories, trained)


def _trained(trial: TrialView, spec: SeenSpec) -> Trained:
    images = spec.tags.get(TRAIN_IMAGES_TAG, ""), spec.tags.get(VAL_IMAGES_TAG, "")
    try:
        return Trained(trial.key, parse_run(spec.record, "its record"), *images)
    except ValueError as error:  # the study's own code has a field that this code does not know
        return Trained(trial.key, None, *images, unread=str(error))


def _base(study: Study) -> BaselineRun | None:
    """What the arms start from, where that is a preset of this code."""
    if not study.baseline.preset:
        return None  # the run file is on the submitter's machine
    try:
        return BaselineRun.of(study, Path())
    except ValueError:
        return None  # the study's own code has a field that this code does not know


def _run_of(study: Study, base: BaselineRun | None, trial: TrialView) -> RunConfig | None:
    """The arm's run from the study alone.

    A trial that waits has no spec in its folder, and the report is made while the study runs.
    """
    if base is None:
        return None
    overrides = {
        path: value
        for factor, level in trial.arm.items()
        for path, value in study.factors.get(factor, {}).get(level, {}).items()
    }
    try:
        return base.arm(overrides, trial.key)
    except ValueError:
        return None  # as above


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


def _earned(
    study: Study,
    trials: Sequence[TrialView],
    facts: Mapping[str, TrialFacts],
    papers: Mapping[str, PaperRow],
) -> Earned:
    if not papers:
        return Earned()
    has_gains = any(row.gains for row in papers.values())
    rows = []
    for trial in trials:
        if trial.state != "done":
            continue  # no number of the table is of it
        row = papers.get(arm_name(trial.arm))
        name = row.name if row else BASELINE_ROW if has_gains and trial.baseline else ""
        if name:
            rows.append((facts[trial.trial].trained, name))
    return earned(study.paper_table, rows)


def _no_paper(study: Study, machinery: str, earns: Earned) -> str:
    """Why there is no paper column; the notes have all reasons."""
    if not study.paper_table:
        return "the study names no table of the paper"
    if machinery:
        return machinery.partition(":")[0]
    others = len(earns.barred) - 1
    more = f" (and {others} more, in the notes)" if others > 0 else ""
    return f"{earns.barred[0]}{more}" if earns.barred else ""
