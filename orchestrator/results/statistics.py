"""What the numbers of a study allow one to say: means, paired differences, intervals, verdicts.

Arms are paired by seed because a seed fixes the sample order, the augmentation and the initial
weights of the parts that two arms share: the difference within a seed has less noise than the arms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from contract.answers import TrialView

MIN_PAIRS = 3  # paired seeds that a verdict needs
CONFIDENCE = 0.95
MIN_EXACT_PAIRS = 6  # two of 2^6 patterns are 0.03, two of 2^5 are 0.06
MAX_EXACT_PAIRS = 16  # sign flips are enumerated up to here: 65,536 of them

Verdict = Literal["", "better", "worse", "not shown"]


@dataclass(frozen=True)
class Summary:
    """One metric of one arm, in its own unit (fractions for AP).

    `low`, `high`: interval of the mean, NaN below two seeds.
    """

    mean: float
    deviation: float  # sample standard deviation over seeds, NaN below two
    low: float
    high: float
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline over the seeds that both have; NaN where the pairs are too few.

    p: two-sided paired t test. p_adjusted: Holm over the study's arms, per metric; the verdict
    rests on it. p_flips: exact sign-flip test, which assumes no normality but needs six pairs to be
    able to reach 0.05.
    """

    mean: float
    low: float
    high: float
    p: float
    p_adjusted: float
    p_flips: float
    verdict: Verdict
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Arm:
    """One row of the table. `marks`: what happened to its trials, in words, one line a trial."""

    arm: dict[str, str]
    baseline: bool
    trials: tuple[TrialView, ...]
    metrics: dict[str, Summary]
    differences: dict[str, Difference]
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All arms in the study's order.

    `machinery_only` says why there are no verdicts; it is empty if there are.
    """

    arms: tuple[Arm, ...]
    machinery_only: str

    @property
    def baseline(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.baseline), None)


def compare_arms(
    trials: Sequence[TrialView], metrics: Sequence[str], machinery_only: str = ""
) -> Comparison:
    """Groups trials into arms and compares each with the baseline arm.

    `machinery_only` withholds every verdict. Metrics beside `metrics` follow in alphabetical order.
    """
    groups: dict[tuple[tuple[str, str], ...], list[TrialView]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.arm.items()), []).append(trial)
    # A name without "/" is a speed, not an evaluation: no arm is better by it.
    names = [*metrics, *sorted({m for t in trials for m in t.metrics if "/" in m} - set(metrics))]
    arms = [_arm(group, names) for group in groups.values()]
    comparison = Comparison(tuple(arms), machinery_only)
    baseline = comparison.baseline
    if baseline is None:
        return comparison
    compared = [
        arm if arm.baseline else replace(arm, differences=_differences(arm, baseline))
        for arm in arms
    ]
    if not machinery_only:
        compared = _with_verdicts(compared, baseline, names)
    return Comparison(tuple(compared), machinery_only)


def _arm(trials: Sequence[TrialView], metrics: Sequence[str]) -> Arm:
    done = [trial for trial in trials if trial.state == "done"]
    summaries = {}
    for metric in metrics:
        values = {t.seed: t.metrics[metric] for t in done if _exists(t.metrics.get(metric))}
        if values:
            summaries[metric] = summarise(values)
    marks = tuple(mark for trial in trials if (mark := _mark(trial)))
    return Arm(trials[0].arm, trials[0].baseline, tuple(trials), summaries, {}, marks)


def _exists(value: float | None) -> bool:
    """pycocotools says -1 where there was nothing to evaluate."""
    return value is not None and math.isfinite(value) and value >= 0


def _mark(trial: TrialView) -> str:
    """What a reader of the table must know of a trial: how it ended, what its loop went through."""
    parts = []
    if trial.state != "done":
        reason = f": {trial.error}" if trial.error else ""
        diverged = "diverged" if trial.error_class == "diverged" else trial.state
        parts.append(f"{diverged}{reason}")
    kinds = [event.kind for event in trial.events]
    for kind in dict.fromkeys(kind for kind in kinds if "rollback" in kind or "rolled" in kind):
        steps = ", ".join(str(event.step) for event in trial.events if event.kind == kind)
        parts.append(f"rolled back after a bad loss (step {steps})")
    return f"{trial.key}: {'; '.join(parts)}" if parts else ""


# --- statistics -------------------------------------------------------------------------------


def summarise(by_seed: Mapping[int, float]) -> Summary:
    """Mean, standard deviation and t interval over seeds."""
    values = list(by_seed.values())
    mean, deviation, half = _moments(values)
    return Summary(mean, deviation, mean - half, mean + half, dict(by_seed))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Arm minus baseline, paired by seed; None without a common seed."""
    pairs = {seed: arm[seed] - baseline[seed] for seed in arm if seed in baseline}
    if not pairs:
        return None
    values = list(pairs.values())
    mean, deviation, half = _moments(values)
    if len(values) < 2:
        p = math.nan
    elif deviation == 0:
        # t would divide by zero: equal differences are certain, and no difference is none.
        p = 1.0 if mean == 0 else 0.0
    else:
        p = t_two_sided(mean / (deviation / math.sqrt(len(values))), len(values) - 1)
    flips = sign_flip_p(values)
    return Difference(mean, mean - half, mean + half, p, p, flips, verdict="", by_seed=pairs)


def _moments(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation, half width of the mean's interval; NaN below two values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, deviation, t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n)


def sign_flip_p(values: Sequence[float]) -> float:
    """Share of all sign patterns whose sum is at least as far from zero.

    NaN below six values, where even the most extreme pattern has a share above 0.05, and above
    MAX_EXACT_PAIRS.
    """
    if not MIN_EXACT_PAIRS <= len(values) <= MAX_EXACT_PAIRS:
        return math.nan
    # The factor lets the observed pattern count itself: sums of floats may differ by rounding.
    observed = abs(math.fsum(values)) * (1 - 1e-12)
    signs = itertools.product((-1, 1), repeat=len(values))
    extreme = sum(
        abs(math.fsum(s * v for s, v in zip(pattern, values, strict=True))) >= observed
        for pattern in signs
    )
    return float(extreme / 2 ** len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order of `p_values`. NaN stays and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, running = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p))
        adjusted[i] = running
    return adjusted


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t.

    It is the regularised incomplete beta I_x(df/2, 1/2) at x = df / (df + t^2).
    """
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = `probability`, for probabilities above one half, by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, df) / 2 > 1 - probability:
        high *= 2
    for _ in range(100):  # halves the interval until floats have no number between its ends
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_two_sided(middle, df) / 2 > 1 - probability else (low, middle)
        )
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The fraction converges fast on one side of this point; symmetry gives the other side.
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _beta_fraction(b, a, 1 - x) / b
    return front * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300  # stands for a zero that the next line would divide by
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1 + coefficient * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + coefficient / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


# --- verdicts ---------------------------------------------------------------------------------


def _differences(arm: Arm, baseline: Arm) -> dict[str, Difference]:
    differences = {}
    for metric, summary in arm.metrics.items():
        if metric in baseline.metrics:
            paired = difference(summary.by_seed, baseline.metrics[metric].by_seed)
            if paired is not None:
                differences[metric] = paired
    return differences


def _with_verdicts(arms: Sequence[Arm], baseline: Arm, metrics: Sequence[str]) -> list[Arm]:
    """`arms` with p values adjusted over the arms of each metric, and the verdicts that follow."""
    results = list(arms)
    for metric in metrics:
        rows = [i for i, arm in enumerate(results) if metric in arm.differences]
        adjusted = holm([results[i].differences[metric].p for i in rows])
        for i, p in zip(rows, adjusted, strict=True):
            paired = results[i].differences[metric]
            whole = _complete(results[i]) and _complete(baseline)
            verdict = _verdict(paired, p) if whole and len(paired.by_seed) >= MIN_PAIRS else ""
            changed = replace(paired, p_adjusted=p, verdict=verdict)
            results[i] = replace(
                results[i], differences={**results[i].differences, metric: changed}
            )
    return results


def _complete(arm: Arm) -> bool:
    """Whether every seed finished.

    Seeds that ended badly are not missing at random: without them an arm looks better than it is.
    """
    return all(trial.state == "done" for trial in arm.trials)


def _verdict(paired: Difference, p: float) -> Verdict:
    if p >= 1 - CONFIDENCE:
        return "not shown"  # which is not "equal": the seeds may be too few
    return "better" if paired.mean > 0 else "worse"
