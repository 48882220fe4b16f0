"""Commands of the other rooms, run as their own programs: this room knows neither tensors nor shards."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    app.command(
        "data",
        context_settings=_FORWARD,
        help="Make, pack, verify, show, export and stage datasets.",
    )(_data)
    app.command("eval", context_settings=_FORWARD, help="Score a COCO results file.")(_eval)
    app.command("train", context_settings=_FORWARD, help="Train one run here, without Ray.")(_train)
    app.command(
        "proposals", context_settings=_FORWARD, help="Write a trained run's proposals to a file."
    )(_proposals)
    app.command(
        "sync", context_settings=_FORWARD, help="Send to MLflow what a run could not send."
    )(_sync)


def _data(context: typer.Context) -> int:
    if context.args[:1] != ["stage"]:
        become("pipelines", "data", *context.args)
    from orchestrator.cli.stage import stage_app

    return int(
        stage_app(args=context.args[1:], prog_name="maskray data stage", standalone_mode=False) or 0
    )


def _eval(context: typer.Context) -> None:
    become("pipelines", "eval", *context.args)


def _train(context: typer.Context) -> None:
    become("workers.train", *context.args)


def _proposals(context: typer.Context) -> None:
    become("workers.propose", *context.args)


def _sync(context: typer.Context) -> None:
    become("workers.sync", *context.args)


def become(module: str, *arguments: str) -> NoReturn:
    """Replaces this process, so that signals, streams and the exit status are the program's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
