"""Whether arms of a public recipe come out where the public number is."""

from __future__ import annotations

from dataclasses import dataclass

from contract.study import Study
from orchestrator.results.comparison import Arm, Comparison
from orchestrator.study.contrasts import parse_arm


@dataclass(frozen=True)
class Calibrated:
    """One number of one arm, as fractions."""

    arm: Arm
    metric: str
    ours: float
    public: float
    band: float

    @property
    def inside(self) -> bool:
        # Public numbers have one decimal: on the edge they are inside.
        return abs(self.ours - self.public) <= self.band + 1e-9


def calibrated(study: Study, comparison: Comparison) -> list[Calibrated]:
    """Every public number of the study whose arm has one of its own; none before the end."""
    if comparison.early:
        return []
    found = []
    for text, numbers in study.calibration.items():
        wanted = parse_arm(text, study.factors, "calibration").items()
        for arm in comparison.arms:
            if wanted <= arm.arm.items():
                found += [
                    Calibrated(arm, name, arm.metrics[name].mean, one.value / 100, one.band / 100)
                    for name, one in numbers.items()
                    if name in arm.metrics
                ]
    return found


def discredited(results: list[Calibrated]) -> str:
    """What follows from numbers outside of their bands; empty if all are inside."""
    outside = [one for one in results if not one.inside]
    if not outside:
        return ""
    return (
        f"{len(outside)} of {len(results)} public numbers are missed by more than their band: do "
        "not believe absolute AP of this code, these data and this machine before you know why"
    )
