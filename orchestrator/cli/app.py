"""The tree of commands. Importing this must stay cheap: `maskray --help` answers at once.

For that reason a command imports what it needs inside its function, and not at the top.
"""

from __future__ import annotations

import typer

from orchestrator.cli import change, compare, doctor, reproduce, service, show, spawned, studies
from orchestrator.cli.keeping import backup

app = typer.Typer(
    name="maskray",
    help="Find out on a cluster what makes Mask R-CNN better: "
    "studies of its arms, from a file to the paper's table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # contract.command prints an error in one line
    rich_markup_mode=None,
)

# The order here is the order in `maskray --help`.
for group in (spawned, studies, compare, show, change, service, backup, reproduce, doctor):
    group.register(app)
