"""A finished trial once more: its record and its code as a new study, and whether the two agree.

On the CPU a run is a function of its record, its code and its number of ranks: everything must be
equal to the bit. On a GPU sums may be taken in another order; there two runs agree if they differ
by no more than two seeds of the arm do.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contract.answers import StudyView, TrialView
from contract.study import Study, Submission
from orchestrator.results.statistics.quantiles import t_quantile
from orchestrator.results.statistics.summary import CONFIDENCE, summarise
from orchestrator.results.trial_files import read_result

TAG = "maskray.reproduces"


@dataclass(frozen=True)
class Pair:
    """One metric of the two runs.

    `allowed`: the difference up to which they agree, None where it is not known.
    """

    metric: str
    before: float | None
    after: float | None
    allowed: float | None

    @property
    def agrees(self) -> bool | None:
        """None where one seed alone says nothing about a difference."""
        if self.before == self.after:
            return True
        if self.before is None or self.after is None:
            return False
        return None if self.allowed is None else abs(self.after - self.before) <= self.allowed


@dataclass(frozen=True)
class Agreement:
    """`same_weights`: None where a hash cannot be read or does not count.

    `agrees`: None is not known.
    """

    rule: str
    pairs: tuple[Pair, ...]
    same_weights: bool | None
    agrees: bool | None

    def as_json(self) -> dict[str, Any]:
        """The answer of `maskray reproduce --json`."""
        pairs = [{**asdict(pair), "agrees": pair.agrees} for pair in self.pairs]
        return {
            "agrees": self.agrees,
            "rule": self.rule,
            "same_weights": self.same_weights,
            "metrics": pairs,
        }


def reproduction(trial: TrialView, original: Submission, fresh: bool) -> Submission:
    """The study of one trial that runs `trial` again.

    Submitted twice it is one study, unless `fresh`. Raises ValueError if the trial has no result to
    compare with.
    """
    if trial.state != "done":
        raise ValueError(
            f"trial {trial.trial} is {trial.state}: only a finished trial can be reproduced"
        )
    plan = next(plan for plan in original.trials if plan.key == trial.key)
    changes = {
        "name": f"again-{original.study.name}"[:80],  # the longest that a study's name may be
        "question": f"does trial {trial.trial} come out the same again?",
        "seeds": (plan.seed,),
        "max_parallel": 0,
        # One trial is no table, least of all beside the paper's.
        "paper_table": "",
        "paper_rows": {},
    }
    return Submission(
        study=Study.model_validate(original.study.model_dump() | changes),
        study_yaml=original.study_yaml,
        trials=(plan.model_copy(update={"tags": {**plan.tags, TAG: trial.trial}}),),
        code=original.code,
        warnings=original.warnings,
        idempotency_key=uuid.uuid4().hex if fresh else f"reproduces {trial.trial}",
        fresh=True,  # otherwise the service would take the result that is to be reproduced
    )


def agreement(trial: TrialView, again: TrialView, study: StudyView) -> Agreement:
    """Compares the results of two finished trials.

    `study` is the study of the first one: on a GPU its other seeds are the measure.
    """
    on_cpu = not Study.model_validate(study.spec).resources.gpus_per_rank
    elsewhere = _other_platform(trial, again) if on_cpu else ""
    exact = on_cpu and not elsewhere
    # A name without "/" is a speed, which no two runs share to the bit.
    names = sorted({name for one in (trial, again) for name in one.metrics if "/" in name})
    spread = {} if exact else _spreads(trial, study.trials, names)
    pairs = tuple(
        Pair(
            name,
            trial.metrics.get(name),
            again.metrics.get(name),
            0.0 if exact else spread.get(name),
        )
        for name in names
    )
    same = None
    # On a GPU two runs of one seed may end with other weights, which says nothing.
    if exact:
        before, after = (_weights(one) for one in (trial, again))
        same = before == after if before and after else None
    seeds = len({other.seed for other in _of_the_arm(trial, study.trials)})
    rule = "to the bit, on the CPU" if exact else f"within what {seeds} seeds of the arm differ by"
    rule += f" ({elsewhere})" if elsewhere else ""
    return Agreement(
        rule,
        pairs,
        same,
        _all([pair.agrees for pair in pairs] + ([same] if same is not None else [])),
    )


def _all(answers: Sequence[bool | None]) -> bool | None:
    """True if all are and there is one, False if one is; otherwise it is not known."""
    if any(answer is False for answer in answers):
        return False
    return None if not answers or None in answers else True


def _spreads(
    trial: TrialView, trials: Sequence[TrialView], names: Sequence[str]
) -> Mapping[str, float]:
    """The difference that 95% of pairs of seeds stay within, by metric.

    A metric that fewer than two seeds have is left out.
    """
    arm, spreads = _of_the_arm(trial, trials), {}
    for name in names:
        # pycocotools says -1 where there was nothing to evaluate.
        by_seed = {
            other.seed: other.metrics[name] for other in arm if other.metrics.get(name, -1.0) >= 0
        }
        if len(by_seed) > 1:
            deviation = summarise(by_seed).deviation
            # The difference of two runs has twice the variance of one.
            spreads[name] = (
                t_quantile((1 + CONFIDENCE) / 2, len(by_seed) - 1) * deviation * math.sqrt(2)
            )
    return spreads


def _of_the_arm(trial: TrialView, trials: Sequence[TrialView]) -> list[TrialView]:
    return [other for other in trials if other.arm == trial.arm and other.state == "done"]


def _other_platform(trial: TrialView, again: TrialView) -> str:
    """How two runs computed otherwise, empty if they did not; then no bits are promised."""
    try:
        before, after = read_result(trial), read_result(again)
    except OSError:
        return ""
    for name in ("platform", "kernels"):
        one, two = getattr(before, name), getattr(after, name)
        if one and two and one != two:
            return f"{name}: {one} then, {two} now"
    return ""


def _weights(trial: TrialView) -> str:
    """The hash of the last weights; empty where the trial's folder cannot be read from here."""
    try:
        return read_result(trial).weights_sha256
    except OSError:
        return ""
