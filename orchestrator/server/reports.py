"""The report of each study, made by the service: while it runs, and once at its end.

So it is there whoever follows, and every reader sees the same one.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from contract.answers import StudyView
from contract.files import uri_join
from contract.study import FINAL_STATES
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger, LedgerBusyError, LedgerError
from orchestrator.ledger.rows import StudyRow
from orchestrator.results.report import FILES, Contents, Format
from orchestrator.server.mlflow import MLflow, TrackingDownError
from orchestrator.server.routes.reports import DRAWING
from orchestrator.server.views import study_views
from orchestrator.trial_folder import TrialFolder

LOG = logging.getLogger("maskray")
PAGE = f"report/{FILES['html']}"  # below a study's folder
_FORMS: tuple[Format, ...] = ("html", "md", "csv", "json")
_RUNNING_S = 60.0  # between two pages of a study that is not over
_JUST_OVER_S = 3600.0  # a service that starts makes the last page of studies that ended meanwhile
_RETRY_S, _LONGEST_RETRY_S = 10.0, 600.0  # after a failure, doubled with each


class _Made(NamedTuple):
    """What there is of a study's report."""

    state: str = ""  # in words
    sent: bool = False  # to MLflow
    tried_at: float = -math.inf
    failures: int = 0  # since the last success

    def due_at(self, over: bool) -> float:
        if self.failures:
            pause = _RETRY_S * 2.0 ** min(self.failures - 1, 9)
            return self.tried_at + min(pause, _LONGEST_RETRY_S)
        return self.tried_at + (0.0 if over else _RUNNING_S)


class Reports:
    """Remembers of which state of each study there is a page. One thread calls `turn`."""

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}  # by study

    def turn(self, ledger: Ledger, mlflow: MLflow | None, now: float) -> None:
        """Makes the pages that are missing or old."""
        unsent = [study for study, made in self._made.items() if not made.sent]
        with ledger.reading() as transaction:
            rows = queries.reported_studies(transaction, now - _JUST_OVER_S, unsent)
        self._made = {row.id: self._made.get(row.id, _Made()) for row in rows}
        for row in rows:
            before = self._made[row.id]
            if now < before.due_at(row.state in FINAL_STATES):
                continue
            # what goes wrong with one study must not stop the others
            try:
                self._made[row.id] = _renewed(ledger, row, before, mlflow, now)
                continue
            except (LedgerError, LedgerBusyError):
                raise  # everybody's trouble
            except (OSError, ValueError, TrackingDownError) as error:
                LOG.warning("report of %s: %s", row.id, " ".join(str(error).split())[:500])
            except Exception:
                LOG.exception("report of %s; tried again", row.id)
            self._made[row.id] = before._replace(
                sent=False, tried_at=now, failures=before.failures + 1
            )


def _renewed(
    ledger: Ledger, row: StudyRow, before: _Made, mlflow: MLflow | None, now: float
) -> _Made:
    """What there is of the report now; it is made if it is old, or if MLflow lacks it."""
    with ledger.reading() as transaction:
        (view,) = study_views(transaction, {}, row.id)
    state = _state(view)
    curves_grow = row.state not in FINAL_STATES and any(trial.progress for trial in view.trials)
    tracked = mlflow is not None and bool(row.mlflow_run_id)
    if state == before.state and not curves_grow and before.sent >= tracked:
        return before
    _make(row, view, mlflow)
    return _Made(state, tracked, now)


def _state(view: StudyView) -> str:
    """Changes whenever the page of a study would say something new."""
    trials = (f"{trial.trial} {trial.state} {trial.attempts}" for trial in view.trials)
    given = f"{len(view.looks)} looks, {len(view.verdicts)} verdicts"
    return "\n".join([view.state, given, *trials])


def _make(row: StudyRow, view: StudyView, mlflow: MLflow | None) -> None:
    """The files beside the study's trials, and with its run in MLflow where it has one."""
    contents = Contents.of(view)
    with DRAWING:
        files = {FILES[form]: contents.rendered(form) for form in _FORMS}
    files["table.txt"] = f"{contents.text()}\n".encode()
    folder = TrialFolder(uri_join(row.storage, row.id))  # where its trials can write too
    for name, data in files.items():
        folder.write(f"report/{name}", data)
    if mlflow is not None and row.mlflow_run_id:
        for name, data in files.items():
            mlflow.put_artifact(row.mlflow_run_id, f"report/{name}", data)
        note = files[FILES["md"]].decode()
        mlflow.set_tags(row.mlflow_run_id, {"mlflow.note.content": note})
