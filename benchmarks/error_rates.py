"""How often a report's verdicts are wrong, and how often it sees a difference: by simulation.

Every study here is random with a fixed generator, so the rates come out the same each time. It
takes the quantiles of the report itself. `--markdown` prints the tables of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from orchestrator.results.statistics.boundaries import (
    MIN_POWER,
    LookRule,
    Taken,
    conditional_power,
)
from orchestrator.results.statistics.contrasts import Part
from orchestrator.results.statistics.quantiles import correlated, max_t_quantile
from orchestrator.results.statistics.summary import CONFIDENCE

STUDIES = 20_000
METRICS = 4
CORRELATION = 0.8  # between the metrics of one seed
COLLAPSE = 0.2  # of an arm's seeds in the last column
FALL = 5.0  # by so many sd
PLANNED = (3, 5, 7, 10)  # looks
Values = NDArray[np.float64]  # study, metric, arm, seed


@dataclass(frozen=True)
class Rates:
    """Shares of studies with at least one false verdict, in percent, by what breaks an assumption.

    primary: each arm against the reference by one metric. The others: by four metrics at once.
    """

    arms: int
    seeds: int
    primary: float
    equal: float
    ratio_2: float
    ratio_3: float
    collapse: float


@dataclass(frozen=True)
class Power:
    """Two arms, one metric: how often a true difference of so many sd is seen, in percent."""

    seeds: int
    coverage: float
    one: float
    two: float
    three: float
    equivalent_1: float  # a true 0 inside a margin of 1 sd
    equivalent_2: float


def draw(
    arms: int,
    seeds: int,
    studies: int,
    ratio: float = 1.0,
    collapse: float = 0.0,
    metrics: int = METRICS,
) -> Values:
    """Studies without any difference. ratio: of the last arm's sd to the others'."""
    rng = np.random.default_rng([arms, seeds, round(10 * ratio), round(10 * collapse)])
    shape = studies, metrics, arms, seeds
    common = rng.standard_normal((studies, 1, arms, seeds))
    values = np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * rng.standard_normal(shape)
    values[:, :, -1] *= ratio
    # A training that collapses does so in all of its metrics.
    fallen = rng.random((studies, 1, arms, seeds)) < collapse
    return np.asarray(values - FALL * fallen)


@cache
def quantile(arms: int, seeds: int, metrics: int) -> float:
    rows = [[float(j == i) - float(j == 0) for j in range(arms)] for i in range(1, arms)]
    level = 1 - (1 - CONFIDENCE) / metrics
    return max_t_quantile(correlated(rows, [1 / seeds] * arms), arms * (seeds - 1), level)


def intervals(values: Values) -> tuple[Values, Values]:
    """Differences to the first arm and half widths, as a report of these metrics makes them."""
    _, metrics, arms, seeds = values.shape
    means = values.mean(axis=3)
    spread = np.sqrt(values.var(axis=3, ddof=1).mean(axis=2, keepdims=True))
    half = quantile(arms, seeds, metrics) * spread * np.sqrt(2 / seeds)
    return means[:, :, 1:] - means[:, :, :1], half


def false_verdicts(values: Values) -> float:
    """The share of studies that call at least one arm better or worse, in percent."""
    difference, half = intervals(values)
    return round(100 * float((np.abs(difference) > half).any(axis=(1, 2)).mean()), 2)


def rates(arms: int, seeds: int, studies: int = STUDIES) -> Rates:
    equal = draw(arms, seeds, studies)
    return Rates(
        arms,
        seeds,
        false_verdicts(equal[:, :1]),
        false_verdicts(equal),
        false_verdicts(draw(arms, seeds, studies, ratio=2.0)),
        false_verdicts(draw(arms, seeds, studies, ratio=3.0)),
        false_verdicts(draw(arms, seeds, studies, collapse=COLLAPSE)),
    )


def power(seeds: int, studies: int = STUDIES) -> Power:
    difference, half = intervals(draw(2, seeds, studies)[:, :1])

    def share(hits: NDArray[np.bool_]) -> float:
        return round(100 * float(hits.mean()), 1)

    return Power(
        seeds,
        share(np.abs(difference) <= half),
        *(share(difference + effect > half) for effect in (1.0, 2.0, 3.0)),
        *(share(np.abs(difference) + half < margin) for margin in (1.0, 2.0)),
    )


@dataclass(frozen=True)
class LookRates:
    """Studies with looks: shares with a false verdict, in percent, as `Rates` has them."""

    arms: int
    equal: float
    ratio_2: float
    ratio_3: float
    collapse: float


@dataclass(frozen=True)
class LookPower:
    """Two arms whose looks stop them: in percent, and the seeds of 10 that an arm does not take.

    settled: if only a verdict stops an arm. hopeless: if too little conditional power does too.
    """

    effect: float  # in sd
    seen: float
    saved: float
    seen_hopeless: float
    saved_hopeless: float


def looks(values: Values, hopeless: bool = True) -> tuple[NDArray[np.bool_], Values]:
    """For each study and arm after the first: whether a look calls it, and the seeds it took.

    values: study, arm, seed. It is what `orchestrator.results.looks` does, for many studies at
    once; those whose arms stopped at the same looks share their boundaries.
    """
    studies, arms, _ = values.shape
    called = np.zeros((studies, arms - 1), dtype=np.bool_)
    stop = np.full((studies, arms - 1), len(PLANNED) - 1)  # the look after which it takes no more
    for k, seeds in enumerate(PLANNED):
        going = stop >= k
        # The order of the arms is of no matter, so each history is simulated once.
        order = np.argsort(-np.where(going, len(PLANNED), stop), axis=1, kind="stable")
        histories = np.take_along_axis(np.where(going, len(PLANNED), stop), order, axis=1)
        for history in np.unique(histories, axis=0):
            mine = np.flatnonzero((histories == history).all(axis=1))
            open_ = np.flatnonzero(history >= k)
            if not len(open_):
                continue
            now, last = reach(tuple(map(int, history)), k)
            difference, error = estimates(values[mine], order[mine], history, seeds)
            hit = np.abs(difference) > now * error
            ends = hit.copy()
            if hopeless and k < len(PLANNED) - 1:
                share = seeds / PLANNED[-1]
                ends |= conditional_power(difference, error, share, last) < MIN_POWER
            for i in open_:
                rows, arm = mine, order[mine, i]
                called[rows, arm] |= hit[:, i]
                stop[rows[ends[:, i]], arm[ends[:, i]]] = k
    return called, np.asarray(PLANNED)[stop].astype(np.float64)


@cache
def reach(history: tuple[int, ...], k: int) -> tuple[float, float]:
    """How many standard errors the intervals of look k reach, now and at the last look."""
    names = [str(i) for i in range(len(history))]

    def numbers(look: int) -> dict[str, int]:
        stops = {n: PLANNED[min(look, stop)] for n, stop in zip(names, history, strict=True)}
        reference = max(PLANNED[min(look, stop)] for stop in history)
        return {"reference": reference, **stops}

    past = tuple(
        Taken(PLANNED[j], numbers(j), [n for n, s in zip(names, history, strict=True) if s == j])
        for j in range(k)
    )
    closed = frozenset(n for n, stop in zip(names, history, strict=True) if stop < k)
    known = numbers(k)
    df = float(sum(n - 1 for n in known.values()))
    parts = [
        Part(n, ("m", ""), 0.0, 1.0, df, 3, {n: 1.0, "reference": -1.0}, {}, True, known)
        for n in names
    ]
    found = LookRule(PLANNED, past, closed)(parts, 1)
    open_ = [one for one, part in zip(found, parts, strict=True) if part.name not in closed]
    return open_[0].now, open_[0].last


def estimates(
    values: Values, order: NDArray[np.int64], history: NDArray[np.int64], seeds: int
) -> tuple[Values, Values]:
    """Differences to the first arm, arms in `order`, with the standard errors of a report."""
    numbers = [min(seeds, PLANNED[min(stop, len(PLANNED) - 1)]) for stop in history]
    reference = values[:, 0, :seeds]
    squares, df = ((reference - reference.mean(axis=1, keepdims=True)) ** 2).sum(axis=1), seeds - 1
    means = []
    for i, number in enumerate(numbers):
        own = np.take_along_axis(values, order[:, i, None, None] + 1, axis=1)[:, 0, :number]
        means.append(own.mean(axis=1))
        squares = squares + ((own - means[-1][:, None]) ** 2).sum(axis=1)
        df += number - 1
    difference = np.stack(means, axis=1) - reference.mean(axis=1, keepdims=True)
    per_seed = 1 / np.asarray(numbers, dtype=np.float64) + 1 / seeds
    return difference, np.sqrt((squares / df)[:, None] * per_seed)


def look_rates(arms: int, studies: int = STUDIES) -> LookRates:
    def share(**broken: float) -> float:
        values = draw(arms, PLANNED[-1], studies, metrics=1, **broken)[:, 0]
        return round(100 * float(looks(values)[0].any(axis=1).mean()), 2)

    return LookRates(arms, share(), share(ratio=2.0), share(ratio=3.0), share(collapse=COLLAPSE))


def look_power(effect: float, studies: int = STUDIES) -> LookPower:
    values = draw(2, PLANNED[-1], studies, metrics=1)[:, 0]
    values[:, 1] += effect
    numbers = []
    for hopeless in (False, True):
        called, taken = looks(values, hopeless)
        numbers += [
            round(100 * float(called.mean()), 1),
            round(PLANNED[-1] - float(taken.mean()), 1),
        ]
    return LookPower(effect, *numbers)


def look_markdown(all_rates: list[LookRates], all_power: list[LookPower]) -> str:
    lines = [
        "| arms | one metric | sd ratio 2 | sd ratio 3 | seeds that collapse |",
        "|---|---|---|---|---|",
    ]
    for r in all_rates:
        shares = (r.equal, r.ratio_2, r.ratio_3, r.collapse)
        lines.append(f"| {r.arms} | " + " | ".join(f"{s:.1f}%" for s in shares) + " |")
    lines += [
        "",
        "| true difference | seen | seeds saved | seen, hopeless stop | seeds saved |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.effect:g} sd | {p.seen:.0f}% | {p.saved:.1f} | {p.seen_hopeless:.0f}% | "
        f"{p.saved_hopeless:.1f} |"
        for p in all_power
    ]
    return "\n".join(lines)


def markdown(all_rates: list[Rates], all_power: list[Power]) -> str:
    lines = [
        "| arms | seeds | one metric | 4 metrics | sd ratio 2 | sd ratio 3 | seeds that collapse |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in all_rates:
        shares = (r.primary, r.equal, r.ratio_2, r.ratio_3, r.collapse)
        lines.append(f"| {r.arms} | {r.seeds} | " + " | ".join(f"{s:.1f}%" for s in shares) + " |")
    lines += [
        "",
        "| seeds | coverage | 1 sd | 2 sd | 3 sd | equal within 1 sd | equal within 2 sd |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in all_power:
        powers = (p.coverage, p.one, p.two, p.three, p.equivalent_1, p.equivalent_2)
        lines.append(f"| {p.seeds} | " + " | ".join(f"{s:.0f}%" for s in powers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES, help="of each row")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the guide")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    all_rates = [rates(arms, seeds, arguments.studies) for arms in (2, 5) for seeds in (3, 5, 10)]
    all_power = [power(seeds, arguments.studies) for seeds in (3, 5, 7, 10, 23)]
    all_look_rates = [look_rates(arms, arguments.studies) for arms in (2, 5)]
    all_look_power = [look_power(effect, arguments.studies) for effect in (0, 1, 2, 3)]
    if arguments.json:
        answer = {
            "rates": list(map(asdict, all_rates)),
            "power": list(map(asdict, all_power)),
            "look_rates": list(map(asdict, all_look_rates)),
            "look_power": list(map(asdict, all_look_power)),
        }
        print(json.dumps(answer))
    else:
        print(f"{markdown(all_rates, all_power)}\n\n")
        print(look_markdown(all_look_rates, all_look_power))


if __name__ == "__main__":
    main()
