"""Following a study to its end: a live table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Literal

from rich.console import Console
from rich.live import Live

from contract.answers import StudyView, TrialView
from contract.attempt import Progress
from contract.study import FINAL_STATES
from contract.words import printable
from orchestrator.cli.options import print_json
from orchestrator.cli.tables import LEAST_COLUMNS, in_two_units, study_table
from orchestrator.client import Client

_POLL_S = 1.0
_LINE_EVERY_S = 15.0  # between two lines of progress of one trial where there is no terminal
_SHOWN = ("bbox/AP", "segm/AP", "segm/AP75", "keypoints/AP")


def follow(client: Client, study: str, mode: Literal["live", "json", "silent"]) -> StudyView:
    """Shows `study` until its state is final or paused. Returns its last view."""
    console = Console(stderr=True)
    # Lines on a narrow terminal: a table that the terminal wraps cannot be drawn over.
    if mode == "live" and sys.stderr.isatty() and console.width >= LEAST_COLUMNS:
        with Live(console=console, auto_refresh=False) as live:
            return _poll(client, study, lambda view: live.update(study_table(view), refresh=True))
    if mode == "live":
        return _poll(
            client, study, _Lines(lambda line, _: print(line, file=sys.stderr, flush=True))
        )
    if mode == "json":
        return _poll(client, study, _Lines(lambda _, trial: print_json(trial.model_dump())))
    return _poll(client, study, lambda _: None)


def _poll(client: Client, study: str, show: Callable[[StudyView], None]) -> StudyView:
    while True:
        view = client.study(study)
        show(view)
        if view.state != "active":  # a paused study may wait for days
            return view
        time.sleep(_POLL_S)


class _Lines:
    """Calls `emit(line, trial)` for each trial whose state changed or whose last line is old."""

    def __init__(self, emit: Callable[[str, TrialView], None]) -> None:
        self._emit = emit
        self._last: dict[str, tuple[str, float]] = {}

    def __call__(self, view: StudyView) -> None:
        for trial in view.trials:
            state, at = self._last.get(trial.trial, ("", 0.0))
            now = time.monotonic()
            going_on = trial.state not in FINAL_STATES and trial.progress is not None
            if trial.state != state or (going_on and now - at >= _LINE_EVERY_S):
                self._last[trial.trial] = (trial.state, now)
                self._emit(_line(view, trial), trial)


def _line(view: StudyView, trial: TrialView) -> str:
    done = sum(other.state in FINAL_STATES for other in view.trials)
    words = [f"[{done}/{len(view.trials)}]", trial.key, trial.state]
    if trial.cached_from:
        words.append(f"(taken from trial {trial.cached_from})")
    if trial.state in FINAL_STATES:
        words += [
            f"{name} {100 * value:.1f}"
            for name, value in trial.metrics.items()
            if name in _SHOWN and value >= 0  # -1: there was nothing to evaluate
        ]
        words += [trial.error] if trial.error else []
    elif trial.state == "queued" and trial.why:
        words.append(f"({trial.why})")
    elif trial.progress is not None:
        words += _progress_words(trial.progress)
    return printable(" ".join(words))


def _progress_words(progress: Progress) -> list[str]:
    words = [progress.phase, f"step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.3f}")
    if progress.images_per_s:  # 0.0 before the first interval ends: nothing was measured yet
        words.append(f"{progress.images_per_s:.1f} img/s")
    if progress.seconds_left is not None:
        words.append(f"{in_two_units(progress.seconds_left)} left")
    return words
