"""Stored detections of a study, evaluated anew: with another scorer, or mended annotations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contract.answers import StudyView, TrialView
from orchestrator.results.table import aligned

SECOND_CHANCE = (
    "these numbers were scored anew, which would be a second chance: no verdicts; those of the "
    "study stand in its own report"
)
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Change:
    """One metric of one trial, as fractions."""

    trial: str
    metric: str
    before: float | None
    after: float


@dataclass(frozen=True)
class Rescored:
    """view: the study with the new numbers. skipped: trials without detections, in words."""

    view: StudyView
    changes: tuple[Change, ...]
    skipped: tuple[str, ...]
    shown: tuple[str, ...]  # the metrics of the study's table

    def as_json(self) -> dict[str, Any]:
        """The answer of `maskray rescore --json`."""
        return {
            "study": self.view.study,
            "trials": {
                trial: {c.metric: c.after for c in self.changes if c.trial == trial}
                for trial in dict.fromkeys(change.trial for change in self.changes)
            },
            "changed": sum(change.before != change.after for change in self.changes),
            "skipped": list(self.skipped),
        }

    def text(self) -> str:
        rows = [
            [c.trial, c.metric, "-" if c.before is None else f"{c.before:.4f}", f"{c.after:.4f}"]
            for c in self.changes
            if c.metric in self.shown
        ]
        changed = sum(change.before != change.after for change in self.changes)
        lines = [
            aligned(["trial", "metric", "before", "now"], rows, left=2),
            f"{changed} of {len(self.changes)} numbers changed",
        ]
        return "\n".join([*lines, *(f"left as it was: {words}" for words in self.skipped)])


def rescored(view: StudyView, data: str, say: Callable[[str], None]) -> Rescored:
    """Scores every finished trial. data: a packed dataset in the place of each trial's own.

    Raises ValueError if no trial has detections, or if the scorer refuses them.
    """
    changes: list[Change] = []
    skipped: list[str] = []
    trials: list[TrialView] = []
    for trial in view.trials:
        new = _scored(trial.storage, data) if trial.state == "done" else {}
        trials.append(trial.model_copy(update={"metrics": trial.metrics | new}))
        changes += [Change(trial.key, m, trial.metrics.get(m), v) for m, v in new.items()]
        if new:
            say(f"{trial.key}: scored")
        elif trial.state == "failed":
            skipped.append(f"{trial.key} failed; maskray retry {view.study}:{trial.key}")
    if not changes:
        why = f"; {skipped[0]}" if skipped else ""
        raise ValueError(f"study {view.study}: no trial has detections to score{why}")
    shown = tuple(view.spec.get("metrics") or ())
    new_view = view.model_copy(update={"trials": trials})
    return Rescored(new_view, tuple(changes), tuple(skipped), shown)


def _scored(folder: str, data: str) -> dict[str, float]:
    """By a program of another room: this one imports no pycocotools."""
    more = ["--data", data] if data else []
    command = [sys.executable, "-m", "workers.rescore", folder, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["the scorer gave no reason"])[-1]
        raise ValueError(last.partition(": ")[2] or last)
    metrics: dict[str, float] = json.loads(done.stdout)
    return metrics
