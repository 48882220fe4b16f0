"""Each contrast of a study in one line, as one would tell it to a colleague."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.results.cells import metric_label, points, verdict_text
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.facts import Facts
from orchestrator.study.contrasts import arm_name
from orchestrator.study.paper import PaperRow


@dataclass(frozen=True)
class Headline:
    """subject: what is asked. paper: the published difference as a fraction, None without one."""

    answer: Answer
    subject: str
    metric: str
    paper: float | None

    @property
    def text(self) -> str:
        """ "RoIAlign +3.6 mask AP [2.3, 4.9], better; paper +3.4: consistent"."""
        estimate = self.answer.estimate
        start = f"{self.subject} {points(estimate.difference, True)} {self.metric}"
        if not self.answer.verdict:
            first, *others = self.answer.withheld.split("; ")
            more = f" (and {len(others)} more, see the notes)" if others else ""
            return f"{start}, no verdict: {first}{more}"
        interval = f"[{points(estimate.low)}, {points(estimate.high)}]"
        text = f"{start} {interval}, {verdict_text(self.answer)}"
        if self.paper is None:
            return text
        return f"{text}; paper {points(self.paper, True)}: {self.agreement}"

    @property
    def agreement(self) -> str:
        """Whether our interval holds the paper's difference; empty without both."""
        estimate = self.answer.estimate
        if self.paper is None or not self.answer.verdict or math.isnan(estimate.low):
            return ""
        # The paper prints one decimal, so its difference is known to a tenth of a point.
        low, high = estimate.low - 0.0005, estimate.high + 0.0005
        return "consistent" if low <= self.paper <= high else "not consistent"

    @property
    def kind(self) -> str:
        """The style class of the line: what may be noise must not look like news."""
        return self.answer.verdict if self.answer.verdict in ("better", "worse") else ""


def headlines(facts: Facts, comparison: Comparison) -> tuple[Headline, ...]:
    """One for each contrast; none while there are no answers."""
    papers = {} if facts.no_paper else {arm_name(dict(k)): row for k, row in facts.papers.items()}
    single = len(facts.study.factors) == 1
    base = comparison.baseline
    reference = arm_name(base.arm) if base else ""
    return tuple(
        Headline(
            answer,
            _subject(answer, single),
            metric_label(answer.asked.metric),
            _published(answer, papers, reference),
        )
        for answer in comparison.answers
    )


def _subject(answer: Answer, single_factor: bool) -> str:
    asked = answer.asked
    # Of one factor, its level says all.
    level = re.fullmatch(r"[^=,]+=([^=,]+)", asked.of) if single_factor else None
    side = level[1] if level else asked.of
    return side if asked.name == asked.of else f"{asked.name}: {side}"


def _published(answer: Answer, papers: Mapping[str, PaperRow], reference: str) -> float | None:
    """The same contrast of the paper's rows, where it has a row for every arm."""
    metric, weights = answer.asked.metric, answer.asked.weights
    rows = {arm: papers[arm] for arm in weights if arm in papers}
    if len(rows) == len(weights) and all(metric in row.metrics for row in rows.values()):
        return math.fsum(weight * rows[arm].metrics[metric] for arm, weight in weights.items())
    # A row may be printed as a gain over the baseline arm alone.
    gained = [arm for arm in weights if weights == {arm: 1.0, reference: -1.0} and arm in rows]
    return rows[gained[0]].gains.get(metric) if gained else None
