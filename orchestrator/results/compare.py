"""Arms against a reference, from files alone: what `maskray compare` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contract.files import finite
from contract.study import Variance
from orchestrator.results.cells import interval_text, metric_label, points
from orchestrator.results.measured import Measured, chosen
from orchestrator.results.soundness import MIN_SEEDS
from orchestrator.results.statistics.contrasts import (
    MAX_DEVIATION_RATIO,
    Contrast,
    Design,
    Estimate,
    deviation_ratio,
    plain,
    simultaneous,
)
from orchestrator.results.statistics.verdicts import verdict_of
from orchestrator.results.table import EXPLORATORY, aligned

WITHHELD = "withheld"


@dataclass(frozen=True)
class Judged:
    """One arm against the reference by the primary metric. why: the verdict is withheld."""

    arm: str
    estimate: Estimate
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Compared:
    """margin: a fraction. exploratory: by the other metrics, each with a plain interval."""

    reference: str
    primary: str
    margin: float
    contrasts: tuple[Judged, ...]
    exploratory: tuple[Estimate, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Fractions; null where the seeds give no interval."""
        return {
            "reference": self.reference,
            "primary": self.primary,
            "margin": self.margin,
            "contrasts": [
                finite(
                    {
                        **self._numbers(judged.arm, judged.estimate),
                        "verdict": judged.verdict,
                        "resolvable": judged.estimate.resolvable,
                    }
                )
                for judged in self.contrasts
            ],
            "exploratory": [
                finite(self._numbers(estimate.contrast.name, estimate))
                for estimate in self.exploratory
            ],
            "notes": list(self.notes),
        }

    def _numbers(self, arm: str, estimate: Estimate) -> dict[str, Any]:
        return {
            "arm": arm,
            "reference": self.reference,
            "metric": estimate.contrast.metric,
            "difference": estimate.difference,
            "low": estimate.low,
            "high": estimate.high,
        }

    def text(self) -> str:
        """Points of AP, as `maskray report` prints them."""
        count = len(self.contrasts)
        together = f"all {count} hold at once in 95% of studies" if count > 1 else "95% interval"
        rows = [[*_row(judged.estimate), _word(judged)] for judged in self.contrasts]
        head = ["arm", "metric", "diff", "95% interval", "seeds", "verdict"]
        blocks = [f"Minus {self.reference}, in points ({together})\n{aligned(head, rows, left=2)}"]
        if self.exploratory:
            others = [_row(estimate) for estimate in self.exploratory]
            blocks.append(f"{EXPLORATORY}\n{aligned(head[:-1], others, left=2)}")
        if self.notes:
            blocks.append("\n".join(["Notes", *(f"- {note}" for note in self.notes)]))
        return "\n\n".join(blocks)


def compare(
    measured: Measured,
    reference: str = "",
    primary: str = "",
    margin: float = 0.0,
    variance: Variance = "pooled",
) -> Compared:
    """Every arm minus the reference. margin: points of AP.

    Raises ValueError for a reference or a metric that the numbers do not have.
    """
    if not 0 <= margin <= 100:
        raise ValueError(f"--margin: {margin:g} is not in 0 to 100 points of AP")
    base = chosen(reference or measured.reference, measured.arms, "reference")
    known = measured.primary if measured.primary in measured.values else ""
    metric = chosen(primary or known, list(measured.values), "primary")
    if base not in measured.values[metric]:
        raise ValueError(f"--reference: {base} has no {metric}")
    arms = [arm for arm in measured.values[metric] if arm != base]
    if not arms:
        raise ValueError(f"no arm beside {base} has {metric}")
    design = Design(variance)
    family = [_minus(arm, base, metric) for arm in arms]
    estimates = simultaneous(family, measured.values, design)
    judged = tuple(
        _judged(arm, estimate, margin / 100, [measured.lost.get(name, "") for name in (arm, base)])
        for arm, estimate in zip(arms, estimates, strict=True)
    )
    others = tuple(
        plain(_minus(arm, base, other), measured.values, design)
        for other, by_arm in measured.values.items()
        for arm in by_arm
        if other != metric and arm != base and base in by_arm
    )
    return Compared(
        base, metric, margin / 100, judged, others, _notes(measured, metric, judged, variance)
    )


def _minus(arm: str, reference: str, metric: str) -> Contrast:
    return Contrast(arm, metric, {arm: 1.0, reference: -1.0})


def _judged(arm: str, estimate: Estimate, margin: float, lost: Sequence[str]) -> Judged:
    why = next(filter(None, lost), "")
    if not why and estimate.seeds < MIN_SEEDS:
        why = f"{estimate.seeds} seeds of an arm, and a verdict takes {MIN_SEEDS}"
    verdict = verdict_of(estimate.low, estimate.high, margin)
    return Judged(arm, estimate, WITHHELD if why else verdict or WITHHELD, why)


def _notes(
    measured: Measured, metric: str, judged: Sequence[Judged], variance: Variance
) -> tuple[str, ...]:
    notes = [f"no verdict on {one.arm}: {one.why}" for one in judged if one.why]
    ratio = deviation_ratio(measured.arms, measured.values[metric])
    if variance == "pooled" and ratio > MAX_DEVIATION_RATIO:
        notes.append(
            f"the seeds of one arm spread {ratio:.1f} times as far as those of another, and the "
            "intervals assume one spread; --variance own does not"
        )
    return tuple(notes)


def _row(estimate: Estimate) -> list[str]:
    return [
        estimate.contrast.name,
        metric_label(estimate.contrast.metric),
        points(estimate.difference, True),
        interval_text(estimate.low, estimate.high),
        str(estimate.seeds),
    ]


def _word(judged: Judged) -> str:
    seen = judged.estimate.resolvable
    if judged.verdict == "not resolved" and not math.isnan(seen):
        return f"not resolved (sees {points(seen)})"
    return judged.verdict
