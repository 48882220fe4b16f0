"""Each contrast of a study in one line, as one would tell it to a colleague."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.results.cells import end, metric_label, points, verdict_text
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.published.beside import Beside, besides


@dataclass(frozen=True)
class Headline:
    """subject: what is asked. beside: the published difference, None without the paper's column."""

    answer: Answer
    subject: str
    metric: str
    beside: Beside | None

    @property
    def text(self) -> str:
        """ "RoIAlign +3.6 mask AP [2.3, 4.9], better; paper +3.4: consistent"."""
        estimate = self.answer.estimate
        start = f"{self.subject} {points(estimate.difference, True)} {self.metric}"
        if not self.answer.verdict:
            first, *others = self.answer.withheld.split("; ")
            more = f" (and {len(others)} more, see the notes)" if others else ""
            return f"{start}, no verdict: {first}{more}"
        interval = f"[{end(estimate.low, False)}, {end(estimate.high, False)}]"
        text = f"{start} {interval}, {verdict_text(self.answer)}"
        if self.beside is None:
            return text
        judged = f": {self.beside.judgement}" if self.beside.judgement else ""
        return f"{text}; paper {points(self.beside.published, True)}{judged}"

    @property
    def kind(self) -> str:
        """The style class of the line: what may be noise must not look like news."""
        return self.answer.verdict if self.answer.verdict in ("better", "worse") else ""


def headlines(facts: Facts, comparison: Comparison) -> tuple[Headline, ...]:
    """One for each contrast; none while there are no answers."""
    found = [] if facts.no_paper else besides(comparison, facts.papers)
    published = {one.asked.name: one for one in found}
    single = len(facts.study.factors) == 1
    return tuple(
        Headline(
            answer,
            _subject(answer, single),
            metric_label(answer.asked.metric),
            published.get(answer.asked.name),
        )
        for answer in comparison.answers
    )


def _subject(answer: Answer, single_factor: bool) -> str:
    asked = answer.asked
    # Of one factor, its level says all.
    level = re.fullmatch(r"[^=,]+=([^=,]+)", asked.of) if single_factor else None
    side = level[1] if level else asked.of
    return side if asked.name == asked.of else f"{asked.name}: {side}"
