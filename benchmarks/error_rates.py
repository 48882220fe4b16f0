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

from orchestrator.results.statistics.contrasts import CONFIDENCE
from orchestrator.results.statistics.quantiles import correlated, max_t_quantile

STUDIES = 20_000
METRICS = 4
CORRELATION = 0.8  # between the metrics of one seed
COLLAPSE = 0.2  # of an arm's seeds in the last column
FALL = 5.0  # by so many sd
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
    if arguments.json:
        answer = {"rates": list(map(asdict, all_rates)), "power": list(map(asdict, all_power))}
        print(json.dumps(answer))
    else:
        print(markdown(all_rates, all_power))


if __name__ == "__main__":
    main()
