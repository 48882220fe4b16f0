"""Telling a person how far something is: a function of (done, total)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]


def silent(_done: int, _total: int) -> None:
    """Shows nothing."""


@contextmanager
def bar(what: str, quiet: bool, lines: bool = False) -> Iterator[Progress]:
    """A bar on stderr if that is a terminal.

    With `lines`, for a log: "WHAT DONE/TOTAL" on stderr at each percent.
    """
    if lines:
        yield lambda done, total: _line(what, done, total)
        return
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    # Only here: a command that shows no bar starts without rich.
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    with RichProgress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _line(what: str, done: int, total: int) -> None:
    # A log of a long staging has a hundred lines, not one for each of its files.
    if done * 100 // total > (done - 1) * 100 // total:
        print(f"{what} {done}/{total}", file=sys.stderr, flush=True)
