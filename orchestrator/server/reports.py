"""The report of each study, made by the service: while it runs, and once at its end.

So it is there whoever follows, and every reader sees the same one.
"""

from __future__ import annotations

import logging

from contract.answers import StudyView
from contract.files import uri_join
from contract.study import FINAL_STATES
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.rows import StudyRow
from orchestrator.results.report import FILES, Contents, Format
from orchestrator.server.mlflow import MLflow, TrackingDownError
from orchestrator.server.routes.reports import DRAWING
from orchestrator.server.views import study_views
from orchestrator.trial_folder import TrialFolder

LOG = logging.getLogger("maskray")
PAGE = f"report/{FILES['html']}"  # below a study's folder
_FORMS: tuple[Format, ...] = ("html", "md", "csv", "json")
_RUNNING_S = 60.0  # between two pages of a study whose trials run: their curves grow
_JUST_OVER_S = 3600.0  # a service that starts makes the last page of studies that ended meanwhile


class Reports:
    """Remembers of which state of each study there is a page. One thread calls `turn`."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[str, float]] = {}  # study -> its state in words, when

    def turn(self, ledger: Ledger, mlflow: MLflow | None, now: float) -> None:
        """Makes the pages that are missing or old."""
        with ledger.reading() as transaction:
            rows = queries.reported_studies(transaction, now - _JUST_OVER_S)
        self._made = {row.id: self._made[row.id] for row in rows if row.id in self._made}
        for row in rows:
            with ledger.reading() as transaction:
                (view,) = study_views(transaction, {}, row.id)
            state, (before, at) = _state(view), self._made.get(row.id, ("", 0.0))
            runs = row.state not in FINAL_STATES and any(trial.progress for trial in view.trials)
            if state == before and not (runs and now - at >= _RUNNING_S):
                continue
            try:
                _make(row, view, mlflow)
            except (OSError, ValueError, TrackingDownError) as error:
                LOG.warning("report of %s: %s", row.id, " ".join(str(error).split())[:500])
            self._made[row.id] = (state, now)


def _state(view: StudyView) -> str:
    """Changes whenever the page of a study would say something new."""
    trials = (f"{trial.trial} {trial.state} {trial.attempts}" for trial in view.trials)
    return "\n".join([view.state, *trials])


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
