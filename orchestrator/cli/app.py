"""The tree of commands. Importing this must stay cheap: `maskray --help` answers at once.

For that reason a command imports what it needs inside its function, and not at the top.
"""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli import change, compare, doctor, reproduce, service, show, spawned, studies
from orchestrator.cli.keeping import backup
from orchestrator.cli.reference import presets

app = typer.Typer(
    name="maskray",
    help="Find out on a cluster what makes Mask R-CNN better: "
    "studies of its arms, from a file to the paper's table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # contract.command prints an error in one line
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"maskray {version('maskray')}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before a command."""


# The order here is the order in `maskray --help`.
groups = (spawned, studies, presets, compare, show, change, service, backup, reproduce, doctor)
for group in groups:
    group.register(app)
