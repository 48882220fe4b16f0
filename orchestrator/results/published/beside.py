"""Which of the paper's numbers may stand beside a study's own: its runs' records earn them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contract.presets import unstated
from contract.recipe import RunConfig
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.published.deviations import Deviation, deviations
from orchestrator.results.published.judgement import (
    Direction,
    Judgement,
    deviation_of,
    direction_of,
    judgement_of,
    one_seed_interval,
)
from orchestrator.study.contrasts import Asked, arm_name
from orchestrator.study.paper import PaperRow, published_difference
from orchestrator.study.paper_runs import TRAIN_IMAGES, VAL_IMAGES, is_of_val2017, published_run


@dataclass(frozen=True)
class Trained:
    """What the record of one trial says: its run, and how many images its data have.

    run: None where the record does not fit this version; `unread` then says why. images: "" is not
    known.
    """

    key: str
    run: RunConfig | None
    train_images: str = ""
    val_images: str = ""
    unread: str = ""


@dataclass(frozen=True)
class Earned:
    """barred: why there is no column of the paper; empty where there is one.

    noted: deviations that leave the difference alone. unstated: what the paper leaves open, and no
    field says.
    """

    barred: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    unstated: tuple[str, ...] = ()


def earned(table: str, trials: Sequence[tuple[Trained, str]]) -> Earned:
    """What the trials of the arms with a published row earn, each with the name of that row."""
    barred: dict[str, None] = {}
    noted: dict[str, None] = {}
    open_: dict[str, None] = {}
    if not is_of_val2017(table):
        barred[f"table {table} is on test-dev, whose annotations are not public"] = None
    if not trials:
        barred["no finished trial"] = None
    for trial, row in trials:
        paper = published_run(table, row)
        if paper is None:
            barred[f"no preset describes the run of table {table}, {row}"] = None
        elif trial.run is None:
            barred[f"{trial.key}: {trial.unread or 'its record is not known'}"] = None
        else:
            found = deviations(trial.run, paper)
            barred |= dict.fromkeys(_fatal(trial, found))
            noted |= dict.fromkeys(one.text for one in found if not one.fatal)
            open_ |= dict.fromkeys(unstated(trial.run.model))
    return Earned(tuple(barred), tuple(noted), tuple(open_))


def _fatal(trial: Trained, found: Sequence[Deviation]) -> list[str]:
    lines = [one.text for one in found if one.fatal]
    for what, images, wanted in (
        ("training", trial.train_images, TRAIN_IMAGES),
        ("validation", trial.val_images, VAL_IMAGES),
    ):
        if images != str(wanted):
            known = re.fullmatch("[0-9]{1,9}", images)
            size = f"has {int(images):,} images" if known else "is of unknown size"
            lines.append(f"the {what} set {size}, the paper's has {wanted:,}")
    return [f"{trial.key}: {line}" for line in lines]


# --- differences --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """One contrast beside the published difference, as fractions.

    low, high: where the paper's single seeds may lie if both measure the same thing. direction: the
    only word where the record earns no column.
    """

    asked: Asked
    difference: float
    published: float
    low: float
    high: float
    judgement: Judgement
    direction: Direction
    withheld: str = ""


def besides(comparison: Comparison, rows: Mapping[str, PaperRow]) -> list[Beside]:
    """The answers whose difference the paper publishes. rows: arm's name -> its row."""
    found = (_beside(answer, comparison, rows) for answer in comparison.answers)
    return [one for one in found if one]


def _beside(answer: Answer, comparison: Comparison, rows: Mapping[str, PaperRow]) -> Beside | None:
    asked, estimate = answer.asked, answer.estimate
    published = published_difference(asked.weights, asked.metric, rows)
    if math.isnan(published) or math.isnan(estimate.difference):
        return None
    low = high = math.nan
    if not answer.withheld:
        seeds = _seeds(answer, comparison)
        spread = deviation_of(estimate, seeds)
        low, high = one_seed_interval(
            estimate.difference, spread, estimate.df, asked.weights, seeds
        )
    return Beside(
        asked,
        estimate.difference,
        published,
        low,
        high,
        judgement_of((low, high), published, answer.verdict),
        direction_of(estimate.difference, published),
        answer.withheld,
    )


def _seeds(answer: Answer, comparison: Comparison) -> dict[str, int]:
    """Arm -> the seeds behind the estimate: a first verdict has its own."""
    if answer.first is not None:
        return {arm: len(trials) for arm, trials in answer.first.trials.items()}
    metric = answer.asked.metric
    return {
        arm_name(arm.arm): len(arm.metrics[metric].by_seed)
        for arm in comparison.arms
        if metric in arm.metrics
    }
