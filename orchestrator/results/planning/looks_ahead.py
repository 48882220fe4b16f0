"""What a study with looks is expected to run: its boundaries, and how many trials it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contract.study import Looks
from orchestrator.results.statistics.boundaries import (
    MIN_POWER,
    SPENT,
    Array,
    LookAt,
    boundaries,
    conditional_power,
    spent,
)
from orchestrator.results.statistics.contrasts import Contrast

EFFECTS = (0.0, 1.0, 2.0, 3.0)  # sd of a seed between the baseline and every other arm
_STUDIES = 2000
_GENERATOR = 1


@dataclass(frozen=True)
class LooksAhead:
    """reaches: metric -> standard errors at each look. expected: effect in sd -> trials of all."""

    seeds: tuple[int, ...]
    reaches: Mapping[str, tuple[float, ...]]
    trials: int
    expected: Mapping[float, float]

    def as_json(self) -> dict[str, Any]:
        """For `maskray plan --json`."""
        return {
            "seeds": list(self.seeds),
            "boundaries": {metric: list(reach) for metric, reach in self.reaches.items()},
            "trials_at_most": self.trials,
            "expected_trials": {f"{effect:g}": n for effect, n in self.expected.items()},
        }

    def lines(self, gpu_hours: float) -> list[str]:
        """What `maskray plan` prints. gpu_hours: of all trials; 0 is not known."""
        looks = ", ".join(map(str, self.seeds))
        texts = [f"Looks at {looks} seeds; an arm stops once its contrasts are settled"]
        for metric, reach in self.reaches.items():
            quantiles = ", ".join(f"{quantile:.2f}" for quantile in reach)
            texts.append(f"  {metric}: intervals of {quantiles} standard errors to each side")
        for effect, trials in self.expected.items():
            cost = f", {gpu_hours * trials / self.trials:.1f} GPU-hours" if gpu_hours else ""
            case = "no arm differs" if not effect else f"the others differ by {effect:g} sd"
            texts.append(f"  if {case}: about {trials:.0f} of {self.trials} trials{cost}")
        return texts


def look_ahead(
    family: Sequence[Contrast], arms: Mapping[str, Sequence[str]], baseline: str, looks: Looks
) -> LooksAhead | None:
    """arms: metric -> the arms that have it. None without a contrast."""
    metrics = list(dict.fromkeys(contrast.metric for contrast in family))
    if not metrics:
        return None
    level = SPENT / len(metrics)
    spending = tuple(spent(seeds, looks.most, level) for seeds in looks.looks)
    reaches = {}
    for metric in metrics:
        names = arms[metric]
        rows = tuple(
            tuple(contrast.weights.get(arm, 0.0) for arm in names)
            for contrast in family
            if contrast.metric == metric
        )
        numbers = [(seeds,) * len(names) for seeds in looks.looks]
        planned = tuple(LookAt(number, number, rows) for number in numbers)
        reaches[metric] = boundaries(planned, spending)
    every = list(dict.fromkeys(arm for names in arms.values() for arm in names))
    expected = {
        effect: _expected(family, every, baseline, looks, reaches, effect) for effect in EFFECTS
    }
    return LooksAhead(looks.looks, reaches, len(every) * looks.most, expected)


def _expected(
    family: Sequence[Contrast],
    arms: Sequence[str],
    baseline: str,
    looks: Looks,
    reaches: Mapping[str, tuple[float, ...]],
    effect: float,
) -> float:
    """Trials of a study, from simulated ones. Its metrics move as one, as they nearly do."""
    rng = np.random.default_rng(_GENERATOR)
    values = rng.standard_normal((_STUDIES, len(arms), looks.most))
    values += effect * (np.array(arms) != baseline)[:, None]
    means = np.stack([values[:, :, :n].mean(axis=2) for n in looks.looks])
    squares = np.stack([values[:, :, :n].var(axis=2) * n for n in looks.looks])
    rows = np.array([[contrast.weights.get(arm, 0.0) for arm in arms] for contrast in family])
    reach = np.array([reaches[contrast.metric] for contrast in family])
    numbers = np.asarray(looks.looks)
    open_ = np.ones((_STUDIES, len(family)), dtype=np.bool_)
    at = np.zeros((_STUDIES, len(arms)), dtype=np.int64)  # the look of an arm's last seed
    going = np.ones_like(at, dtype=np.bool_)
    for k, seeds in enumerate(looks.looks):
        at[going] = k
        taken = numbers[at].astype(np.float64)
        mean = np.take_along_axis(means, at[None], axis=0)[0]
        square = np.take_along_axis(squares, at[None], axis=0)[0]
        spread = square.sum(axis=1) / (taken - 1).sum(axis=1)
        difference, error = mean @ rows.T, np.sqrt(spread[:, None] * ((1 / taken) @ (rows**2).T))
        open_ &= np.abs(difference) <= reach[:, k] * error
        if seeds < looks.most:
            open_ &= _hopes(difference, error, seeds / looks.most, reach[:, -1])
            going = (open_ @ (rows != 0).astype(np.float64)) > 0
    return float(numbers[at].sum(axis=1).mean())


def _hopes(difference: Array, error: Array, share: float, last: Array) -> NDArray[np.bool_]:
    powers = [
        conditional_power(difference[:, i], error[:, i], share, float(quantile)) >= MIN_POWER
        for i, quantile in enumerate(last)
    ]
    return np.stack(powers, axis=1)
