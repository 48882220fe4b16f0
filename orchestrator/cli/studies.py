"""Commands from a study file to its table: plan, submit, run, report, schema."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.ids import open_client, study_id
from orchestrator.cli.options import (
    AsJson,
    Code,
    Data,
    Debug,
    StudyFile,
    StudyId,
    print_json,
    print_result,
    say,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from contract.answers import StudyView, Submitted
    from contract.study import Submission
    from orchestrator.client import Client
    from orchestrator.study.code_package import CodePackage

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Run trials anew that have a finished result.")
]
Key = Annotated[
    str,
    typer.Option(
        "--key", help="Idempotency key: the same study sent twice with one key is one study."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the report; default: .maskray/reports/STUDY_ID."),
]


def register(app: typer.Typer) -> None:
    for command in (plan, submit, run, report, schema):
        app.command()(command)


def plan(
    study: StudyFile, data: Data = "", code: Code = "", json: AsJson = False, debug: Debug = False
) -> None:
    """Show what a study would run: trials, ranks, identities, what is cached. Starts nothing."""
    from orchestrator.local.connect import local_settings, running_client
    from orchestrator.local.stack import own_nodes
    from orchestrator.results.planning.foresight import measured_spread
    from orchestrator.results.planning.plan import gangs_at_once, make_plan, measured_speeds
    from orchestrator.server import accept

    submission, _ = _prepare(study, data, code)
    client = running_client()  # a plan starts no service: without one nothing is cached either
    if client:
        client.check(submission)
    else:
        settings = local_settings(Path.cwd())
        accept.check_plan(submission, settings, own_nodes(settings), runs=lambda: True)
    finished = client.finished([trial.identity for trial in submission.trials]) if client else {}
    views = client.studies() if client else []
    speeds = measured_speeds(submission.study.name, views)
    spread = measured_spread(submission.study.baseline.preset, views)
    gangs = gangs_at_once(submission.study, client.info().cluster.nodes) if client else 0
    # as the tables call them
    names = {trial.trial: f"{view.study}:{trial.key}" for view in views for trial in view.trials}
    result = make_plan(submission, finished, speeds, gangs, spread, names)
    print_result(result.as_json(), result.text(), json)


def submit(
    study: StudyFile,
    data: Data = "",
    code: Code = "",
    fresh: Fresh = False,
    key: Key = "",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Submit a study and return at once with its id."""
    _, accepted = _submit(study, data, code, fresh, key)
    print_result(accepted, accepted.study, json)


def run(
    study: StudyFile,
    data: Data = "",
    code: Code = "",
    fresh: Fresh = False,
    key: Key = "",
    out: Out = None,
    json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Submit a study, follow it to the end and print its table.
    Interrupting leaves the study running.
    """
    from orchestrator.cli.follow import follow

    client, accepted = _submit(study, data, code, fresh, key)
    study_id = accepted.study
    say(f"study {study_id}: {accepted.trials} trials")
    try:
        view = follow(client, study_id, mode="silent" if json else "live")
    except KeyboardInterrupt:
        say(
            f'the study goes on; "maskray watch {study_id}" follows it, '
            f'"maskray cancel {study_id}" ends it'
        )
        raise
    page, table = _report(client, view, out)
    if json:
        print_json({**_outcome(view), "report": str(page)})
    else:
        print(f"{table}\n\nreport: {page}\nMLflow: maskray ui {view.study}")
    return SUCCESS if view.state == "done" else WORK_FAILED


def report(
    study: StudyId,
    form: Annotated[
        str, typer.Option("--format", help="Print this alone: html, md, latex, csv, json or png.")
    ] = "",
    out: Out = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a study's report (HTML, CSV, JSON) and print its table; works while the study runs."""
    from contract.record import nearest
    from orchestrator.results.report import FILES, Contents

    if form and form not in FILES:
        raise ValueError(f"--format {form}: there is no such form; {nearest(form, FILES)}")
    client = open_client()
    view = client.study(study_id(client, study))
    for known in FILES:
        if form == known:
            elsewhere = client.connection.root is None  # and so may be the trials' storage
            data = (
                client.report_form(view.study, known)
                if elsewhere
                else Contents.of(view).rendered(known)
            )
            _print_form(data, FILES[known], out, json)
            return
    page, table = _report(client, view, out)
    text = f"{table}\n\nreport: {page}"
    print_result({**_outcome(view), "report": str(page)}, text, json)


def _print_form(data: bytes, name: str, out: Path | None, json: bool) -> None:
    """To the folder `out` if there is one, else to stdout. A terminal gets no picture."""
    if out is None and not json and not (name.endswith(".png") and sys.stdout.isatty()):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    folder = out or Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    print_result({"file": str(folder / name)}, str(folder / name), json)


def schema(
    what: Annotated[
        str, typer.Argument(metavar="study|run|fields", help="A record, or the page of all fields.")
    ],
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a study or a run file for editors, or all fields for people."""
    from contract.recipe import RunConfig
    from contract.study import Study
    from orchestrator.cli.reference.fields import fields_page

    if what == "fields":
        page = fields_page()
        print_result({"page": page}, page, json)
        return

    records: dict[str, type[BaseModel]] = {"study": Study, "run": RunConfig}
    if what not in records:
        raise ValueError(f"schema {what!r}: there are 'study', 'run' and 'fields'")
    described = records[what].model_json_schema()
    print_result(described, jsonlib.dumps(described, indent=2), json)


def _prepare(
    study: Path, data: str, code: str, fresh: bool = False, key: str = ""
) -> tuple[Submission, CodePackage]:
    """The submission as the code that travels expands it, and that code."""
    from orchestrator.face import prepare
    from orchestrator.study.read import read_study

    record, text = read_study(study)
    submission, sources = prepare(record, text, data, code, fresh, key)
    for warning in submission.warnings:
        say(f"warning: {warning}")
    return submission, sources


def _submit(study: Path, data: str, code: str, fresh: bool, key: str) -> tuple[Client, Submitted]:

    submission, sources = _prepare(study, data, code, fresh, key)
    client = open_client()
    # The service refuses a study whose code it does not have yet.
    client.upload_code(sources.sha256, sources.data)
    try:
        return client, client.submit(submission)
    except RuntimeError as error:  # the answer was lost: nobody here knows whether it was taken
        again = f"send it again with --key {submission.idempotency_key}, which makes one study"
        raise RuntimeError(f"{error}; {again}") from error


def _report(client: Client, view: StudyView, out: Path | None) -> tuple[Path, str]:
    from orchestrator.local.connect import state_folder
    from orchestrator.results.report import build_report

    folder = out or state_folder() / "reports" / view.study
    if client.connection.root is None:  # this machine may not reach the trials' storage
        return _fetched(client.report(view.study), folder)
    built = build_report(view, folder)
    return built.page, built.table


def _fetched(files: Mapping[str, bytes], folder: Path) -> tuple[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / Path(name).name).write_bytes(data)
    return folder / "report.html", files["table.txt"].decode().rstrip("\n")


def _outcome(view: StudyView) -> dict[str, Any]:
    fields = {"trial", "key", "arm", "seed", "state", "attempts", "metrics", "error", "cached_from"}
    return {
        "study": view.study,
        "state": view.state,
        "trials": [trial.model_dump(include=fields) for trial in view.trials],
    }
