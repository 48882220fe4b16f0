"""Commands that look at studies and steer them: status, watch, logs, queue, cancel and their like."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer

from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.options import Debug, Json, JsonLines, StudyId, print_json, say

Target = Annotated[
    str, typer.Argument(metavar="STUDY_ID", help="A study; cancel and retry take a trial too.")
]
TrialId = Annotated[str, typer.Argument(metavar="TRIAL_ID", help="Id of a trial, or STUDY_ID:KEY.")]


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(watch)
    app.command()(logs)
    app.command()(queue)
    for action, text in _ACTIONS.items():
        app.command(action, help=text)(_action_command(action))
    app.command(context_settings={"ignore_unknown_options": True})(
        priority
    )  # a negative one is no option
    app.command()(forget)


_ACTIONS = {
    "cancel": "End a study: running trials checkpoint and stop, waiting ones never start.",
    "pause": "Stop a study's trials at a checkpoint; they keep their place.",
    "resume": "Go on with a paused study.",
    "retry": "Run a study's failed trials again.",
}


_DONE = {
    "cancel": "is being cancelled",
    "pause": "is being paused",
    "resume": "goes on",
    "retry": "is tried again",
}


def status(
    study: Annotated[
        str, typer.Argument(metavar="[STUDY_ID]", help="Without it: all studies.")
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show all studies, or the trials of one."""
    from orchestrator.cli import tables
    from orchestrator.cli.names import study_id
    from orchestrator.local.connect import connected_client

    client = connected_client()
    if not study:
        views = client.studies(trials=json)
        print_json(
            {"studies": [view.model_dump() for view in views]}
        ) if json else tables.print_studies(views)
        return
    view = client.study(study_id(client, study))
    print_json(view.model_dump()) if json else tables.print_study(view)


def watch(study: StudyId, json: JsonLines = False, debug: Debug = False) -> int:
    """Follow a study live until it ends; ends with 1 if it failed or was cancelled."""
    from orchestrator.cli import tables
    from orchestrator.cli.follow import follow
    from orchestrator.cli.names import study_id
    from orchestrator.local.connect import connected_client

    client = connected_client()
    view = follow(client, study_id(client, study), mode="json" if json else "live")
    if not json:
        tables.print_study(view)
    return WORK_FAILED if view.state in ("failed", "cancelled") else SUCCESS


def logs(
    trial: TrialId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing until the trial ends.")
    ] = False,
    attempt: Annotated[int, typer.Option(help="Attempt number; 0 is the newest.")] = 0,
    rank: Annotated[int, typer.Option(help="Rank; -1 is the driver that starts the ranks.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with -f one a line.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the log of one rank of a trial."""
    from orchestrator.cli.names import trial_id
    from orchestrator.local.connect import connected_client

    client = connected_client()
    trial = trial_id(client, trial)
    offset = 0
    hinted = False
    collected: list[str] = []
    while True:
        page = client.logs(trial, attempt=attempt, rank=rank, offset=offset)
        if json and follow:
            for line in page.text.splitlines():
                print_json(
                    {"trial": trial, "attempt": page.attempt, "rank": page.rank, "line": line}
                )
        elif json:
            collected.append(page.text)
        else:
            print(page.text, end="", flush=True)
        ended = page.next == offset
        offset = page.next
        if not offset and not hinted:
            hinted = True
            say(
                f"trial {trial}: nothing written yet"
                if page.attempt
                else f"trial {trial}: not started yet"
            )
        if ended and (page.done or not follow):
            break
        if ended:
            time.sleep(1)
    if json and not follow:
        print_json(
            {"trial": trial, "attempt": page.attempt, "rank": page.rank, "text": "".join(collected)}
        )


def queue(json: Json = False, debug: Debug = False) -> None:
    """Show what runs, what waits, in which order and why."""
    from orchestrator.cli import tables
    from orchestrator.local.connect import connected_client

    view = connected_client().queue()
    print_json(view.model_dump()) if json else tables.print_queue(view.running, view.queue)


def _action_command(action: str) -> Callable[..., None]:
    def command(
        target: Target,
        json: Json = False,
        debug: Debug = False,
    ) -> None:
        from orchestrator.cli.names import is_trial, study_id, trial_id
        from orchestrator.local.connect import connected_client

        client = connected_client()
        if action in ("cancel", "retry") and is_trial(client, target):
            trial = trial_id(client, target)
            _say_done(action, "trial", trial, client.act_on_trial(trial, action), json)
            return
        study = study_id(client, target)
        view = client.act_on_study(study, action)
        _say_done(action, "study", study, view.changed, json, state=view.state)

    return command


def _say_done(action: str, what: str, name: str, changed: bool, json: bool, **more: str) -> None:
    if json:
        print_json({what: name, "action": action, "changed": changed, **more})
    elif changed:
        print(f"{what} {name} {_DONE[action]}")
    else:
        state = f"it is {more['state']}" if more else "its state does not allow it"
        print(f"{what} {name} stays as it is, there is nothing to {action}: {state}")


def priority(
    study: StudyId,
    value: Annotated[int, typer.Argument(min=-100, max=100, help="Larger goes first.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Change a study's priority."""
    from orchestrator.cli.names import study_id
    from orchestrator.local.connect import connected_client

    client = connected_client()
    study = study_id(client, study)
    client.set_priority(study, value)
    print_json({"study": study, "priority": value}) if json else print(
        f"study {study} has priority {value}"
    )


def forget(study: StudyId, json: Json = False, debug: Debug = False) -> None:
    """Remove a finished study from the ledger; its files stay."""
    from orchestrator.cli.names import study_id
    from orchestrator.local.connect import connected_client

    client = connected_client()
    study = study_id(client, study)
    client.forget(study)
    print_json({"study": study, "forgotten": True}) if json else print(
        f"study {study} is forgotten; its files stay"
    )
