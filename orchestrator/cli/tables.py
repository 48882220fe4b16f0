"""The tables that `status`, `watch` and `queue` print for a person."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from contract.answers import Forgotten, QueueEntry, StudyView, TrialView
from contract.attempt import Progress
from contract.study import FINAL_STATES
from contract.words import printable

LEAST_COLUMNS = 80  # that a table takes

_STYLES = {
    "done": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "starting": "cyan",
    "held": "dim",
    "spared": "dim",
}


def print_studies(views: Sequence[StudyView], where: str) -> None:
    """where: whose studies they are, in words that follow "no studies yet"."""
    if not views:
        print(f'no studies yet {where}; "maskray run STUDY.yaml" starts one')
        return
    table = _table("study", "name", "owner", "state", "priority", "ended", "age")
    for view in views:
        done = sum(count for state, count in view.counts.items() if state in FINAL_STATES)
        state = Text(view.state, _STYLES.get(view.state, ""))
        age = in_two_units(time.time() - view.created_at)
        _add(
            table,
            view.study,
            view.name,
            view.owner,
            state,
            str(view.priority),
            f"{done}/{sum(view.counts.values())}",
            age,
        )
    _print(table)


def print_study(view: StudyView) -> None:
    _print(study_table(view))


def size_of(kept: Forgotten) -> str:
    """In GiB, as `maskray plan` says what a study will take, and where."""
    return f"{'' if kept.whole else 'more than '}{kept.bytes / 2**30:.2f} GiB in {kept.folder}"


def print_queue(running: Sequence[QueueEntry], waiting: Sequence[QueueEntry]) -> None:
    if not running and not waiting:
        print("nothing runs and nothing waits")
        return
    table = _table("", "trial", "study", "owner", "priority", "needs", "state", "why")
    for entry in [*running, *waiting]:
        place = str(entry.position) if entry.position else "-"
        state = Text(entry.state, _STYLES.get(entry.state, ""))
        _add(
            table,
            place,
            entry.key,
            entry.study_name,
            entry.owner,
            str(entry.priority),
            entry.needs,
            state,
            entry.why,
        )
    _print(table)


def study_table(view: StudyView) -> RenderableType:
    """One line a trial, and below them what went wrong or gives pause."""
    table = _table("trial", "state", "step", "loss", "img/s", "left", "AP box", "AP mask")
    notes: list[Text] = []  # below the table, where a sentence has the whole width
    for trial in view.trials:
        # A trial that is over keeps its last progress; its metrics say more.
        progress = trial.progress if trial.state not in FINAL_STATES else None
        _add(
            table,
            trial.key,
            Text(_state(trial), _STYLES.get(trial.state, "")),
            *(_progress_cells(progress) if progress is not None else ("",) * 4),
            number(_points(trial, "bbox/AP"), 1),
            number(_points(trial, "segm/AP"), 1),
        )
        if trial.error:
            notes.append(_note(f"{trial.key}: {trial.error}", "red"))
        elif trial.state == "queued" and trial.why:
            notes.append(_note(f"{trial.key} waits: {trial.why.removeprefix('waits ')}", "dim"))
        if trial.state in FINAL_STATES and trial.why:
            notes.append(_note(f"{trial.key}: {trial.why}", "yellow"))
        notes.extend(_note(f"{trial.key}: {event.text}", "yellow") for event in trial.events)
    notes.extend(_note(f"warning: {warning}", "yellow") for warning in view.warnings)
    goes_on = f"; maskray resume {view.study} goes on" if view.state == "paused" else ""
    title = Text(f"{view.name} ({view.study}): {view.state}{goes_on}", "bold")
    return Group(title, table, *notes)


def _progress_cells(progress: Progress) -> tuple[str, str, str, str]:
    return (
        f"{progress.step}/{progress.steps}",
        number(progress.loss, 3),
        number(progress.images_per_s, 1),
        in_two_units(progress.seconds_left),
    )


def _state(trial: TrialView) -> str:
    if trial.cached_from:
        return f"{trial.state} (earlier result)"
    phase = trial.progress.phase if trial.progress is not None else "starting"
    if trial.state == "running" and phase in ("evaluating", "finishing"):
        return phase  # the step stands still then, which looks like a trial that hangs
    return f"{trial.state} (attempt {trial.attempts})" if trial.attempts > 1 else trial.state


def _points(trial: TrialView, metric: str) -> float | None:
    value = trial.metrics.get(metric)
    # -1 says that there was nothing to evaluate.
    return None if value is None or value < 0 else 100 * value


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def in_two_units(seconds: float | None) -> str:
    """Seconds in the two largest units: `1 h 20 min`, `3 min 5 s`."""
    if seconds is None:
        return ""
    seconds = max(0, round(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _note(words: str, style: str) -> Text:
    return Text(printable(words), style)


def _table(*headers: str) -> Table:
    table = Table(*headers, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a cut name is no name
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """A row. A name is shown as it is: rich would take `[low]` in it for markup."""
    table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells))


def _print(renderable: RenderableType) -> None:
    console = Console()
    # A pipe has no width: do not fold what another program will read. A narrow terminal wraps
    # whole lines, which reads better than columns of one letter.
    width = max(console.width, LEAST_COLUMNS) if console.is_terminal else 240
    Console(width=width).print(renderable)
