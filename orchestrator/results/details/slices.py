"""Where arms differ: by the size of the objects, and by their class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.results.cells import Row, Table, arm_label, arms_table, interval_text, points
from orchestrator.results.comparison import Arm, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.statistics.summary import CONFIDENCE, Summary, summarise

_SIZES = ("APs", "APm", "APl")
_MOST_CLASSES = 10  # lines of the table; the note counts the others


@dataclass(frozen=True)
class Classes:
    """`table` has the largest differences; `note` says how many there are, and how many by chance.

    Both are empty where no result says anything of classes.
    """

    table: Table | None
    note: str


def sizes_table(facts: Facts, comparison: Comparison) -> Table | None:
    """AP of small, medium and large objects; None if no arm has another AP than the baseline."""
    group = facts.primary.partition("/")[0]
    metrics = [f"{group}/{size}" for size in _SIZES]
    differs = any(
        difference.mean
        for arm in comparison.arms
        for metric, difference in arm.differences.items()
        if metric in metrics
    )
    present = [m for m in metrics if any(m in arm.metrics for arm in comparison.arms)]
    return arms_table(comparison, present) if differs else None


def classes(facts: Facts, comparison: Comparison) -> Classes:
    """Classes whose difference to the baseline has a plain interval without 0, largest first."""
    base = comparison.baseline
    reference = _by_class(facts, base) if base else {}
    if not reference or comparison.early or comparison.machinery_only:
        return Classes(None, "")
    rows: list[tuple[float, Row]] = []
    count = 0
    for arm in comparison.arms:
        for name, values in ({} if arm.baseline else _by_class(facts, arm)).items():
            paired = {
                s: v - reference[name][s] for s, v in values.items() if s in reference.get(name, {})
            }
            if len(paired) < 2:
                continue  # one seed has no interval
            count += 1
            summary = summarise(paired)
            if not summary.low <= 0 <= summary.high:
                rows.append((abs(summary.mean), _row(arm, name, summary)))
    rows.sort(key=lambda pair: -pair[0])
    chance = (1 - CONFIDENCE) * count
    note = (
        f"{len(rows)} of {count} differences by class have a plain "
        f"{100 * CONFIDENCE:.0f}% interval without 0; chance alone gives about {chance:.1f}"
    )
    if len(rows) > _MOST_CLASSES:
        note += f". The {_MOST_CLASSES} largest are shown"
    head = ("arm", "class", "diff", f"{100 * CONFIDENCE:.0f}% interval")
    shown = tuple(row for _, row in rows[:_MOST_CLASSES])
    return Classes(Table(head, shown, left=2) if shown else None, note if count else "")


def _row(arm: Arm, name: str, summary: Summary) -> Row:
    interval = interval_text(summary.low, summary.high)
    return Row.of(arm_label(arm), name, points(summary.mean, True), interval)


def _by_class(facts: Facts, arm: Arm) -> dict[str, dict[int, float]]:
    """Class -> seed -> AP of the primary kind, from the results of finished trials."""
    kind = f"{facts.primary.partition('/')[0]}/AP"
    values: dict[str, dict[int, float]] = {}
    for trial in arm.trials:
        if trial.state == "done":
            for name, value in _finite(facts.trials[trial.trial].result.per_class.get(kind, {})):
                values.setdefault(name, {})[trial.seed] = value
    return values


def _finite(values: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    """Without the -1 of a class that has no object."""
    return [(name, v) for name, v in values.items() if math.isfinite(v) and v >= 0]
