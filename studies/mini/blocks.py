"""How much two arms of one seed have in common: the correlation that decides on blocks.

It reads `table.csv` of reports on studies whose arms share their seeds. A seed is a block: its
trials see the same order of images and begin alike. The correlation is the intraclass one, from
the mean squares between and within blocks after each arm's mean is taken off.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Squares = tuple[float, int, float, int, int]  # between, its degrees of freedom, within, its, arms


def blocks(table: Path, metric: str) -> NDArray[np.float64]:
    """(arms, seeds) of the metric; only seeds that every arm has."""
    values: dict[str, dict[str, float]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["state"] == "done" and row["metric"] == metric and row["value"]:
                values.setdefault(row["arm"], {})[row["seed"]] = float(row["value"])
    shared = sorted(set.intersection(*map(set, values.values()))) if values else []
    return np.array([[arm[seed] for seed in shared] for arm in values.values()])


def squares(values: NDArray[np.float64]) -> Squares:
    """Sums of squares of (arms, seeds) and their degrees of freedom."""
    arms, seeds = values.shape
    rest = values - values.mean(axis=1, keepdims=True)
    between = arms * float((rest.mean(axis=0) ** 2).sum())
    within = float((rest**2).sum()) - between
    return between, seeds - 1, within, (arms - 1) * (seeds - 1), arms


def correlation(parts: list[Squares]) -> float:
    """Of several studies together, each in units of its own mean square."""
    ratios, weights = [], []
    for between, df_between, within, df_within, arms in parts:
        high, low = between / df_between, within / df_within
        ratios.append((high - low) / (high + (arms - 1) * low))
        weights.append(df_between)
    return float(np.average(ratios, weights=weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="+", help="table.csv of reports")
    parser.add_argument("--metrics", nargs="+", default=["bbox/AP", "segm/AP", "keypoints/AP"])
    args = parser.parse_args()
    for metric in args.metrics:
        parts, seeds = [], 0
        for table in args.tables:
            values = blocks(table, metric)
            if values.ndim == 2 and min(values.shape) > 1:
                parts.append(squares(values))
                seeds += values.shape[1]
                one = correlation(parts[-1:])
                print(f"{table}: {metric} {one:.2f} ({len(values)} arms, {values.shape[1]} seeds)")
        if len(parts) > 1:
            print(f"together: {metric} {correlation(parts):.2f} in {seeds} blocks")


if __name__ == "__main__":
    main()
