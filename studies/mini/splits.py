"""How often a study of n and n runs of one arm finds a difference: by random splits of a control.

It reads `table.csv` of the report on a study with `control: same_arm`, takes the runs of all of its
copies together, and deals them out again at random.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.results.statistics.contrasts import Contrast, simultaneous

SPLITS = 2000


def runs(table: Path, metrics: list[str]) -> NDArray[np.float64]:
    """(runs, metrics) of the trials that have all of them."""
    values: dict[str, dict[str, float]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["state"] == "done" and row["metric"] in metrics and row["value"]:
                values.setdefault(f"{row['arm']}/{row['seed']}", {})[row["metric"]] = float(
                    row["value"]
                )
    whole = [[run[m] for m in metrics] for run in values.values() if len(run) == len(metrics)]
    return np.array(whole)


def false_verdicts(
    values: NDArray[np.float64], metrics: list[str], each: int, splits: int
) -> float:
    """The share of random studies of `each` and `each` runs that call one arm better."""
    rng = np.random.default_rng([each, len(values)])
    false = 0
    for _ in range(splits):
        chosen = rng.permutation(len(values))[: 2 * each]
        dealt = {
            metric: {
                arm: dict(enumerate(values[part, column]))
                for arm, part in (("first", chosen[:each]), ("second", chosen[each:]))
            }
            for column, metric in enumerate(metrics)
        }
        family = [Contrast(m, m, {"second": 1.0, "first": -1.0}) for m in metrics]
        false += any(one.low > 0 or one.high < 0 for one in simultaneous(family, dealt))
    return false / splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="table.csv of the control's report")
    parser.add_argument("--metrics", nargs="+", default=["bbox/AP", "segm/AP"])
    parser.add_argument("--splits", type=int, default=SPLITS, help="of each size")
    args = parser.parse_args()
    values = runs(args.table, args.metrics)
    print(f"{len(values)} runs; standard deviations in points:")
    for metric, deviation in zip(args.metrics, values.std(axis=0, ddof=1), strict=True):
        print(f"  {metric} {100 * deviation:.2f}")
    for each in (3, 5):
        if 2 * each <= len(values):
            rate = false_verdicts(values, args.metrics, each, args.splits)
            print(f"{each} + {each} runs: {100 * rate:.1f}% of {args.splits} splits, promised 5%")


if __name__ == "__main__":
    main()
