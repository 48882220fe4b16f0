"""Commands about the service itself: serve, down, ui, user, users, gc."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contract.command import SUCCESS
from orchestrator.cli.ids import is_trial, open_client, study_id, trial_id
from orchestrator.cli.options import AsJson, Debug, print_json, print_result, say

if TYPE_CHECKING:
    from orchestrator.client import Client

_MIB = 1 << 20
_KEEP_DAYS = 30.0
_START_S = 60  # in which a local MLflow server answers


def register(app: typer.Typer) -> None:
    for command in (serve, down, ui, user, users, gc):
        app.command()(command)


def serve(
    home: Annotated[
        str,
        typer.Option(help="Folder of the service's own files; default: the settings', or .maskray"),
    ] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; anything but 127.0.0.1 needs a token.")
    ] = "",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = -1,
    ledger: Annotated[str, typer.Option(help="SQLAlchemy URL; default: SQLite in HOME.")] = "",
    storage: Annotated[
        str, typer.Option(help="Folder or pyarrow.fs URI for trial folders; default: in HOME.")
    ] = "",
    ray: Annotated[str, typer.Option(help="URL of a Ray dashboard; 'local' starts a head.")] = "",
    mlflow: Annotated[str, typer.Option(help="URI of an MLflow server; 'local' starts one.")] = "",
    mlflow_public: Annotated[str, typer.Option(help="The same server as a browser opens it.")] = "",
    settings: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options go before it.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print them and end.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Run the service in the foreground.
    Ctrl-C ends it; trials on a Ray cluster that is not its own go on.
    """
    from contract.record import parse_record
    from orchestrator.settings import ServiceSettings, read_settings, without_secrets

    options = {
        "home": home,
        "host": host,
        "ledger": ledger,
        "storage": storage,
        "ray": ray,
        "mlflow": mlflow,
        "mlflow_public": mlflow_public,
    }
    chosen = read_settings(settings) if settings is not None else {}
    chosen |= {name: value for name, value in options.items() if value}
    if port >= 0:  # 0 is a port of its own meaning, so an option left out is -1
        chosen["port"] = port
    chosen["home"] = str(Path(chosen.get("home", ".maskray")).absolute())
    record = parse_record(ServiceSettings, chosen, str(settings or "serve"))
    if check:
        shown = without_secrets(record)
        print_result(shown, shown.model_dump_json(indent=2), json)
        return SUCCESS
    from orchestrator.server.service import serve as run

    # The token comes in the environment: every user of the machine can read a command line.
    return run(record, first_token=os.environ.get("MASKRAY_TOKEN", ""))


def down(json: AsJson = False, debug: Debug = False) -> None:
    """End this folder's local service, its Ray head and its MLflow server.
    What ran is taken up by the next one.
    """
    from orchestrator.local.connect import shut_down

    ended = shut_down(Path.cwd())
    print_result({"ended": ended}, "ended" if ended else "nothing was running here", json)


def ui(
    name: Annotated[
        str,
        typer.Argument(metavar="[STUDY|TRIAL]", help="Without it: the newest study."),
    ] = "",
    parent: Annotated[
        bool, typer.Option("--parent", help="The study's own run: its table and its report.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the address of a study's or a trial's page in MLflow.
    Opens it in a browser where there is a screen.
    """
    client = open_client()
    uri = _mlflow_uri(client)
    page = mlflow_page(client, uri, name, parent)
    print_result({"mlflow": uri, "page": page}, page, json)
    has_screen = bool(os.environ.get("DISPLAY")) or sys.platform == "darwin"
    if json or not sys.stdout.isatty() or not has_screen:
        return
    import webbrowser

    if not webbrowser.open(page):
        say("no browser could be opened; the address is above")


def _mlflow_uri(client: Client) -> str:
    for _ in range(_START_S):
        info = client.info()
        if info.mlflow_uri:
            return info.mlflow_uri
        if not info.has_mlflow:
            raise RuntimeError(
                "the service runs without MLflow; start it with --mlflow URI or --mlflow local"
            )
        time.sleep(1.0)  # a local MLflow starts with its service
    raise RuntimeError(f"the service has no MLflow server after {_START_S} s; its log says why")


def mlflow_page(client: Client, uri: str, name: str, parent: bool) -> str:
    """The page of a study or a trial; of all experiments while there is no study."""
    from orchestrator.study.links import experiment_path, experiments_path, run_path

    if not name and not client.studies(trials=False):
        return uri.rstrip("/") + experiments_path()
    trial = trial_id(client, name) if name and is_trial(client, name) else ""
    if trial and parent:
        raise ValueError(f"--parent: is for a study, and {name} is a trial; give one of the two")
    study = trial.rpartition("-")[0] if trial else study_id(client, name or "last")
    view = client.study(study)
    for _ in range(_START_S):
        if view.mlflow_experiment_id:
            break
        time.sleep(1.0)
        view = client.study(study)
    if not view.mlflow_experiment_id:
        raise RuntimeError(
            f"study {view.study} has no page in MLflow yet; try again in some seconds"
        )
    runs = [one.mlflow_run_id for one in view.trials if one.trial == trial]
    runs = [view.mlflow_run_id] if parent else runs
    if runs and not runs[0]:
        raise RuntimeError(f"{trial or view.study}: has no run in MLflow yet; try again later")
    path = run_path(view.mlflow_experiment_id, runs[0]) if runs else ""
    return uri.rstrip("/") + (path or experiment_path(view.mlflow_experiment_id))


def user(
    name: Annotated[str, typer.Argument(help="Name of the user.")],
    role: Annotated[str, typer.Option(help="read, submit or admin.")] = "submit",
    remove: Annotated[bool, typer.Option("--remove", help="Take the user's access away.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Replace the token of a user who has one.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give a user a new token (printed this once), or take it away. Needs an admin's token."""
    client = open_client()
    if remove:
        print_result(client.remove_user(name), f"user {name} has no access any more", json)
        return
    known = next((known for known in client.users() if known.name == name), None)
    if known is not None and not yes:
        what = f"user {name} has a token already, with role {known.role!r}"
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError(f"{what}; --yes gives a new one, and the old one ends")
        typer.confirm(f"{what}. Give a new one, and end the old one?", abort=True)
    made = client.set_user(name, role)
    print_result(made, made.token, json)


def users(json: AsJson = False, debug: Debug = False) -> None:
    """List who has a token, and with which role. Needs an admin's token."""
    known = open_client().users()
    width = max((len(one.name) for one in known), default=0)
    lines = [f"{one.name:{width}}  {one.role}" for one in known]
    print_result({"users": [one.model_dump() for one in known]}, "\n".join(lines), json)


def gc(
    checkpoints_days: Annotated[
        float, typer.Option(min=0, help="Days to keep checkpoints after a study ended.")
    ] = _KEEP_DAYS,
    forgotten: Annotated[
        bool, typer.Option("--forgotten", help="Whole folders of forgotten studies instead.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove; without it the list is only shown.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove the checkpoints of studies that ended long ago; results, weights and reports stay.
    Shows first.
    """
    if forgotten and checkpoints_days != _KEEP_DAYS:
        raise ValueError("--checkpoints-days has no effect with --forgotten; leave one out")
    client = open_client()
    if forgotten:
        answer = client.collect_forgotten(apply)
    else:
        answer = client.collect_garbage(checkpoints_days, apply)
    if json:
        print_json(answer)
        return
    for removal in answer.removals:
        print(f"{removal.bytes / _MIB:10.1f} MiB  {removal.folder}")
    total = sum(removal.bytes for removal in answer.removals)
    verb = "removed" if answer.applied else "would be removed (--apply does it)"
    print(f"{total / _MIB:10.1f} MiB in {len(answer.removals)} folders {verb}")
    if answer.applied and answer.freed_bytes < total:
        stays = total - answer.freed_bytes
        print(f"{stays / _MIB:10.1f} MiB of them stay; the service's log says why")
