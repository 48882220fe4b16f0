"""The tree of commands. Importing this must stay cheap: `maskray --help` answers in under a second."""

from __future__ import annotations

import typer

from orchestrator.cli import doctor, reproduce, rooms, service, steering, studies

app = typer.Typer(
    name="maskray",
    help="Find out on a cluster what makes Mask R-CNN better: studies of its arms, from a file to the paper's table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

rooms.register(app)
studies.register(app)
steering.register(app)
service.register(app)
reproduce.register(app)
doctor.register(app)
