"""Commands of the other rooms. Each runs as its own program, because this room imports no torch."""

from __future__ import annotations

import typer

from orchestrator.cli.programs import become

# The program that takes over reads its own arguments, `--help` included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


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
