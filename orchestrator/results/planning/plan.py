"""What a study would cost, before anything starts."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contract.answers import NodeView, StudyView
from contract.recipe import RunConfig
from contract.study import Study, Submission, TrialPlan
from orchestrator.results.planning.checkpoint_size import checkpoint_bytes
from orchestrator.results.planning.foresight import Foresight, Spread, assumed_spreads, foresee
from orchestrator.results.table import aligned
from orchestrator.results.trial_files import SeenRun, seen
from orchestrator.schedule.gang import fit, take
from orchestrator.schedule.run_spec import gang_of


@dataclass(frozen=True)
class PlannedTrial:
    """hours: of training, 0 where no speed is known.

    cached: the trial whose result is taken; empty if this one runs.
    """

    trial: TrialPlan
    ranks: int
    cached: str
    hours: float


@dataclass(frozen=True)
class Plan:
    """gpu_hours, longest_h and whole_h cover the trials that would run at a known speed.

    `unknown` counts the others. whole_h: from the first start to the last end at the cluster's
    size, 0 where that is not known.
    """

    name: str
    trials: tuple[PlannedTrial, ...]
    ranks_at_once: int
    gpu_hours: float
    longest_h: float
    whole_h: float
    unknown: int
    disk_gib: float
    foresight: Foresight

    def as_json(self) -> dict[str, Any]:
        """The answer of `maskray plan --json`; null where a time is not known."""
        return {
            "study": self.name,
            "foresight": self.foresight.as_json(),
            "trials": [
                {
                    "trial": planned.trial.key,
                    "arm": planned.trial.arm,
                    "seed": planned.trial.seed,
                    "baseline": planned.trial.baseline,
                    "ranks": planned.ranks,
                    "identity": planned.trial.identity,
                    "cached": bool(planned.cached),
                    "cached_from": planned.cached,
                    "hours": planned.hours or None,
                }
                for planned in self.trials
            ],
            "totals": {
                "trials": len(self.trials),
                "to_run": sum(not planned.cached for planned in self.trials),
                "cached": sum(bool(planned.cached) for planned in self.trials),
                "ranks_at_once": self.ranks_at_once,
                "gpu_hours": None if self.unknown else self.gpu_hours,
                "longest_trial_hours": None if self.unknown else self.longest_h,
                "whole_study_hours": self.whole_h if self.whole_h and not self.unknown else None,
                "trials_of_unknown_speed": self.unknown,
                "disk_gib": self.disk_gib,
            },
        }

    def text(self) -> str:
        """What `maskray plan` prints."""
        rows = [
            [
                planned.trial.key + (" (baseline)" if planned.trial.baseline else ""),
                planned.trial.identity[:12],
                str(planned.ranks),
                f"{planned.hours:.1f}" if planned.hours else "-",
                f"result of {planned.cached}" if planned.cached else "to run",
            ]
            for planned in self.trials
        ]
        table = aligned(["trial", "identity", "ranks", "hours", ""], rows, left=2)
        to_run = sum(not planned.cached for planned in self.trials)
        lines = [
            f"{len(self.trials)} trials, {to_run} to run, "
            f"{self.ranks_at_once} ranks if all run at once"
        ]
        if self.unknown:
            lines.append(
                f"time: not known for {self.unknown} trials, "
                "no trial of these arms has been measured yet"
            )
        elif to_run:
            whole = f", {self.whole_h:.1f} h for the study on this cluster" if self.whole_h else ""
            lines.append(
                f"time: {self.longest_h:.1f} h for the longest trial{whole}, "
                f"{self.gpu_hours:.1f} GPU-hours in all"
            )
        lines.append(f"disk: about {self.disk_gib:.1f} GiB of checkpoints and weights")
        looks = self.foresight.looks
        hours = 0.0 if self.unknown else self.gpu_hours
        ahead = ["", *looks.lines(hours)] if looks else []
        return "\n".join([table, "", *lines, *self._sees(), *ahead])

    def _sees(self) -> list[str]:
        """What the contrasts can see, and the seeds that what is expected of them takes."""
        head, rows = self.foresight.table()
        if not rows:
            return []
        sources = "; ".join(f"{s.points:.2g} {s.source}" for s in self.foresight.spreads)
        seeds = "1 seed" if self.foresight.seeds == 1 else f"{self.foresight.seeds} seeds"
        return [
            "",
            f"With {seeds}, in points of AP at a power of 80%, and the seeds "
            "that the expected difference takes",
            f"(sd between seeds: {sources})",
            aligned(head, rows, left=2),
        ]


def make_plan(
    submission: Submission,
    finished: Mapping[str, str],
    speeds: Mapping[str, float] | None = None,
    gangs: int = 0,
    spread: Spread | None = None,
) -> Plan:
    """What the submission costs.

    finished: identity -> trial with a result. speeds: arm of a trial's key -> images/s of its gang,
    if measured. gangs: how many trials of this study the cluster can hold at once; 0 if that is not
    known. spread: between seeds, if measured.
    """
    resources, planned = submission.study.resources, []
    disk = gpu_hours = longest = 0.0
    unknown = 0
    for trial in submission.trials:
        cached = "" if submission.fresh else finished.get(trial.identity, "")
        speed = (speeds or {}).get(_arm_of(trial.key), 0.0)
        hours = seen(SeenRun, trial.run).images / speed / 3600 if speed else 0.0
        planned.append(PlannedTrial(trial, resources.ranks, cached, hours))
        if cached:
            continue  # its result is there: no time, no GPU, no new checkpoints
        unknown += not hours
        longest = max(longest, hours)
        gpu_hours += hours * resources.ranks * resources.gpus_per_rank
        disk += checkpoint_bytes(RunConfig.model_validate(trial.run)) / 2**30
    to_run = sum(not entry.cached for entry in planned)
    # `max_parallel` 0 is no limit.
    at_once = min(to_run, submission.study.max_parallel or to_run) * resources.ranks
    slots = min(gangs, submission.study.max_parallel or gangs)
    whole = (
        whole_hours([entry.hours for entry in planned if not entry.cached], slots) if slots else 0.0
    )
    return Plan(
        submission.study.name,
        tuple(planned),
        at_once,
        gpu_hours,
        longest,
        whole,
        unknown,
        disk,
        foresee(submission, [spread] if spread else assumed_spreads()),
    )


def gangs_at_once(study: Study, nodes: Sequence[NodeView]) -> int:
    """How many trials of the study the cluster holds when it is empty.

    0 if it holds none, or if no node is known.
    """
    free = {node.id: dict(node.total) for node in nodes}
    # The queue's own rule of what fits, until nothing more does.
    gang, count = gang_of(study), 0
    while (placement := fit(gang, free)) is not None:
        take(free, gang, placement)
        count += 1
    return count


def whole_hours(hours: Sequence[float], gangs: int) -> float:
    """When the last trial ends if each starts on the gang that is free first, the longest first."""
    free_at = [0.0] * gangs
    for length in sorted(hours, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


def measured_speeds(study: str, views: Sequence[StudyView]) -> dict[str, float]:
    """Images/s by arm, from finished trials of earlier submissions of the study of that name."""
    # The latest comes last and so wins: it ran the newest code.
    return {
        _arm_of(trial.key): trial.metrics["images_per_s"]
        for view in sorted(views, key=lambda view: view.created_at)
        if view.name == study
        for trial in view.trials
        if trial.state == "done" and trial.metrics.get("images_per_s", 0) > 0
    }


def _arm_of(key: str) -> str:
    return key.rpartition("/")[0]  # a key is "factor=level,factor=level/seed-0"
