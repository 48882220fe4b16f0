"""Commands of the other rooms. Each runs as its own program, because this room imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from orchestrator.cli.programs import become

# The program that takes over reads its own arguments, `--help` included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


_FLAGS = ("--json", "--debug", "--help", "-h")  # all other options there take a value


def register(app: typer.Typer) -> None:
    app.command(
        "data",
        context_settings=_PASS_ON,
        help="Make, pack, verify, show, export and stage datasets.",
    )(_data)
    app.command("eval", context_settings=_PASS_ON, help="Score a COCO results file.")(_eval)
    app.command("train", context_settings=_PASS_ON, help="Train one run here, without Ray.")(_train)
    app.command(
        "proposals", context_settings=_PASS_ON, help="Write a trained run's proposals to a file."
    )(_proposals)
    app.command(
        "predict", context_settings=_PASS_ON, help="Predict on images: pictures and COCO results."
    )(_predict)
    app.command(
        "export",
        context_settings=_PASS_ON,
        help="Write weights by torchvision's or detectron2's names, or a program of torch.export.",
    )(_export)
    app.command(
        "register",
        context_settings=_PASS_ON,
        help="Make a trial's weights a version of a model in MLflow.",
    )(_register)
    app.command(
        "sync", context_settings=_PASS_ON, help="Send to MLflow what a run could not send."
    )(_sync)


def _data(context: typer.Context) -> int:
    if context.args[:1] != ["stage"]:
        become("pipelines", "data", *context.args)
    # Staging alone asks the service for its nodes, so it starts in this room.
    from orchestrator.cli.stage import stage_app

    arguments = context.args[1:]
    return int(
        stage_app(args=arguments, prog_name="maskray data stage", standalone_mode=False) or 0
    )


def _eval(context: typer.Context) -> None:
    become("pipelines", "eval", *context.args)


def _train(context: typer.Context) -> None:
    become("workers.train", *context.args)


def _proposals(context: typer.Context) -> None:
    become("workers.propose", *context.args)


def _sync(context: typer.Context) -> None:
    become("workers.sync", *context.args)


def _predict(context: typer.Context) -> None:
    become("workers.predict", *_with_folder(context.args))


def _export(context: typer.Context) -> None:
    become("workers.export", *_with_folder(context.args))


def _register(context: typer.Context) -> None:
    become("workers.register", *_with_folder(context.args))


def _with_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments with the folder of a trial in the place of its name.

    The first argument that is no option names what is trained: a path, or a trial. Only a trial
    needs the service.
    """
    result = list(arguments)
    place = _first_place(result)
    if place is not None:
        name = result[place]
        if "://" not in name and not Path(name).expanduser().exists():
            result[place] = _trial_folder(name) or name
    return result


def _first_place(arguments: Sequence[str]) -> int | None:
    """Where the first argument is that belongs to no option."""
    places = iter(range(len(arguments)))
    for place in places:
        argument = arguments[place]
        if not argument.startswith("-"):
            return place
        if argument not in _FLAGS and "=" not in argument:
            next(places, None)  # the option's value
    return None


def _trial_folder(name: str) -> str:
    """Where the trial of that name is; "" if there is none and `name` is not STUDY:KEY."""
    from orchestrator.cli.ids import is_trial, open_client, trial_id
    from orchestrator.local.connect import running_client

    client = open_client() if ":" in name else running_client()
    if client is None or not is_trial(client, name):
        return ""
    trial = trial_id(client, name)
    view = client.study(trial.rpartition("-")[0])
    return next(other.storage for other in view.trials if other.trial == trial)
