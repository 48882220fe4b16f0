"""Commands that change a study or a trial: cancel, pause, resume, retry, priority, forget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.ids import is_trial, open_client, study_id, trial_id
from orchestrator.cli.options import AsJson, Debug, StudyId, print_result, say

if TYPE_CHECKING:
    from contract.answers import StudyAction

Target = Annotated[
    str, typer.Argument(metavar="STUDY_ID", help="A study; cancel and retry take a trial too.")
]

_HELP: Mapping[StudyAction, str] = {
    "cancel": "End a study: running trials checkpoint and stop, waiting ones never start.",
    "pause": "Stop a study's trials at a checkpoint; they keep their place.",
    "resume": "Go on with a paused study.",
    "retry": "Run a study's failed trials again.",
}

_EFFECT: Mapping[StudyAction, str] = {
    "cancel": "is being cancelled",
    "pause": "is being paused",
    "resume": "goes on",
    "retry": "is tried again",
}


def register(app: typer.Typer) -> None:
    for action, text in _HELP.items():
        app.command(action, help=text)(_action_command(action))
    # A negative priority looks like an option; click must pass it on as the argument.
    app.command(context_settings={"ignore_unknown_options": True})(priority)
    app.command()(forget)


def _action_command(action: StudyAction) -> Callable[..., None]:
    def command(target: Target, json: AsJson = False, debug: Debug = False) -> None:

        client = open_client()
        if (action == "cancel" or action == "retry") and is_trial(client, target):
            trial = client.act_on_trial(trial_id(client, target), action)
            words = _sentence(f"trial {target}", action, trial.changed, "")
            print_result(trial, words, json)
            return
        view = client.act_on_study(study_id(client, target), action)
        result = {"study": view.study, "action": action, "changed": view.changed}
        words = _sentence(f"study {view.study}", action, view.changed, view.state)
        print_result({**result, "state": view.state}, words, json)

    return command


def _sentence(thing: str, action: StudyAction, changed: bool, state: str) -> str:
    if changed:
        return f"{thing} {_EFFECT[action]}"
    why = f"it is {state}" if state else "its state does not allow it"
    return f"{thing} stays as it is, there is nothing to {action}: {why}"


def priority(
    study: StudyId,
    value: Annotated[int, typer.Argument(min=-100, max=100, help="Larger goes first.")],
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Change a study's priority."""
    client = open_client()
    view = client.set_priority(study_id(client, study), value)
    text = f"study {view.study} has priority {value}"
    print_result({"study": view.study, "priority": value}, text, json)


def forget(
    study: StudyId,
    files: Annotated[
        bool, typer.Option("--files", help="Delete its folder too: results, weights, checkpoints.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove a finished study from the ledger. Its files stay without --files, MLflow's always."""
    from orchestrator.cli.tables import size_of

    client = open_client()
    kept = client.keeps(study_id(client, study))
    where = size_of(kept)
    say(f"study {kept.study}: {where} {'are deleted' if files else 'stay'}; MLflow keeps its runs")
    for borrower in kept.borrowers:
        say(f"  {borrower} has its result from here")
    asked = sys.stdin.isatty() and not json
    if files and not yes and not asked:
        raise ValueError("--files deletes for good, and nobody can be asked here; add --yes")
    if asked and not yes and not typer.confirm(f"forget study {kept.study}?"):
        raise ValueError(f"study {kept.study} stays as it is")
    answer = client.forget(kept.study, files)
    end = f"{where} are deleted" if answer.deleted else f"its files stay, {where}"
    print_result(answer, f"study {answer.study} is forgotten; {end}", json)
