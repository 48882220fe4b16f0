"""How a run shows its progress to a person: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from contract.attempt import Progress

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
    to = stream or sys.stdout
    if not to.isatty():
        # `sys.stdout` is looked up at each call: `--json` and Ray's ranks redirect it meanwhile
        return lambda progress: print(
            progress_text(progress), file=stream or sys.stdout, flush=True
        )

    def show(progress: Progress) -> None:
        filled = round(_BAR_CHARS * progress.step / progress.steps)
        end = "\n" if progress.phase == "finishing" else ""
        # back to the first column and clear the line: the bar replaces the one before
        to.write(
            f"\r\x1b[K[{'#' * filled}{'.' * (_BAR_CHARS - filled)}] {progress_text(progress)}{end}"
        )
        to.flush()

    return show


def show_nothing(_: Progress) -> None:
    """For every rank but the first."""
