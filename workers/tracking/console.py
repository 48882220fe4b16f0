"""How a run shows its progress to a person: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

from contract.attempt import Progress
from contract.machine import streams

_BAR_CHARS = 30


def progress_text(progress: Progress) -> str:
    """One line: phase, step, loss, rate, time left."""
    parts = [f"{progress.phase} step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.images_per_s is not None:
        parts.append(f"{progress.images_per_s:.1f} images/s")
    # the estimate counts training steps: it says nothing of an evaluation
    if progress.seconds_left is not None and progress.phase == "training":
        minutes, seconds = divmod(int(progress.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def progress_shower(stream: TextIO | None = None) -> Callable[[Progress], None]:
    """Returns what to call with each Progress. By default that writes to standard output."""

    def show_or_drop(progress: Progress) -> None:
        try:
            show(progress)
        except BrokenPipeError:  # its reader has ended, as in `| head`: the training goes on
            streams.flush_or_drop()

    show = _bar_shower(stream or sys.stdout) if (stream or sys.stdout).isatty() else _lines(stream)
    return show_or_drop


def _lines(stream: TextIO | None) -> Callable[[Progress], None]:
    # `sys.stdout` is looked up at each call: `--json` and Ray's ranks redirect it meanwhile
    return lambda progress: print(progress_text(progress), file=stream or sys.stdout, flush=True)


def _bar_shower(to: TextIO) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        filled = round(_BAR_CHARS * progress.step / progress.steps)
        end = "\n" if progress.phase == "finishing" else ""
        text = progress_text(progress)
        bar = f"[{'#' * filled}{'.' * (_BAR_CHARS - filled)}] "
        # a line that the terminal wraps cannot be replaced
        width = shutil.get_terminal_size().columns - 1
        line = bar + text if len(bar) + len(text) <= width else text[:width]
        # back to the first column and clear the line: the bar replaces the one before
        to.write(f"\r\x1b[K{line}{end}")
        to.flush()

    return show


def show_nothing(_: Progress) -> None:
    """For every rank but the first."""
