"""Finished trials once more: `reproduce` runs one again, `rescore` only evaluates it anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.ids import open_client, study_id, trial_id
from orchestrator.cli.options import (
    AsJson,
    Debug,
    StudyId,
    TrialId,
    print_json,
    print_result,
    say,
)

if TYPE_CHECKING:
    from contract.answers import StudyView, TrialView
    from orchestrator.client import Client
    from orchestrator.results.reproduce import Agreement


def register(app: typer.Typer) -> None:
    app.command()(reproduce)
    app.command()(rescore)


def reproduce(
    trial: TrialId,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Once more, although it was reproduced before.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Run a finished trial's record and code again; ends with 0 if the metrics agree,
    with 1 if they do not.
    """
    from orchestrator.cli.follow import follow
    from orchestrator.results.reproduce import agreement, reproduction

    client = open_client()
    original, view = _original(client, trial_id(client, trial))
    submission = client.submission(view.study)
    again = reproduction(original, submission, fresh)
    # Without its own code the trial would run another version's, and prove nothing.
    if submission.code and not client.has_code(submission.code):
        raise ValueError(
            f"trial {original.trial}: its code package is gone from the service's storage"
        )
    study = client.submit(again).study
    say(f"trial {original.trial} runs again as study {study}")
    try:
        ended = follow(client, study, mode="silent" if json else "live")
    except KeyboardInterrupt:
        say(
            f'it goes on; "maskray reproduce {original.trial}" follows it again, '
            f'"maskray cancel {study}" ends it'
        )
        raise
    second = ended.trials[0]
    if second.state != "done":
        raise RuntimeError(
            f"study {study} is {ended.state}{f': {second.error}' if second.error else ''}; "
            f'"maskray retry {study}" goes on with it, --fresh starts anew'
        )
    result = agreement(original, second, view)
    if json:
        names = {"trial": original.trial, "reproduction": second.trial, "study": study}
        print_json({**names, **result.as_json()})
    else:
        _show(original, second, result)
    return SUCCESS if result.agrees else WORK_FAILED


def rescore(
    study: StudyId,
    data: Annotated[
        str, typer.Option("--data", help="Packed validation set; default: each trial's own.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the report; default: .maskray/reports/STUDY-again."),
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluate a study's stored detections anew, with today's scorer and annotations.
    The study keeps its numbers and verdicts; a report of the new ones is written beside them.
    """
    from orchestrator.local.connect import state_folder
    from orchestrator.results.report import build_report
    from orchestrator.results.rescore import SECOND_CHANCE, rescored

    client = open_client()
    view = client.study(study_id(client, study))
    scored = rescored(view, data, say)
    folder = out or state_folder() / "reports" / f"{view.study}-again"
    page = build_report(scored.view, folder, SECOND_CHANCE).page
    print_result(
        {**scored.as_json(), "report": str(page)}, f"{scored.text()}\n\nreport: {page}", json
    )


def _original(client: Client, trial: str) -> tuple[TrialView, StudyView]:
    """The trial that ran, and its study. A cached trial leads to the one that made its result."""
    view = client.study(trial.rpartition("-")[0])
    named = next(one for one in view.trials if one.trial == trial)
    source = named.cached_from
    if not source:
        return named, view
    known = {one.study for one in client.studies(trials=False)}
    # A person may have forgotten the source's study; the cached trial holds the same result.
    return _original(client, source) if source.rpartition("-")[0] in known else (named, view)


def _show(trial: TrialView, again: TrialView, result: Agreement) -> None:
    from orchestrator.results.table import aligned

    rows = []
    for pair in result.pairs:
        allowed = "not known" if pair.allowed is None else f"{pair.allowed:.4f}"
        words = {True: "agrees", False: "differs", None: "not known"}[pair.agrees]
        rows.append([pair.metric, _number(pair.before), _number(pair.after), allowed, words])
    print(aligned(["metric", trial.trial, again.trial, "allowed", ""], rows, left=1))
    if result.same_weights is not None:
        print(f"last weights: {'equal' if result.same_weights else 'different'}")
    conclusion = {
        True: f"reproduced: {result.rule}",
        False: f"not reproduced: they should agree {result.rule}",
        None: "not known: too few seeds of this arm have a result to say what a difference means",
    }
    print(conclusion[result.agrees])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
