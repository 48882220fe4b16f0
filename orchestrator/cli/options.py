"""Options and arguments that several commands share, and the one way they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
JsonLines: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
StudyFile: TypeAlias = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).")]
StudyId: TypeAlias = Annotated[
    str, typer.Argument(metavar="STUDY_ID", help="Id of a study; 'last' is the newest.")
]
Data: TypeAlias = Annotated[
    str,
    typer.Option("--data", metavar="DIR", help="Folder or URI holding packed 'train' and 'val'."),
]
Code: TypeAlias = Annotated[
    str,
    typer.Option(
        "--code",
        metavar="REF",
        help="Commit whose code runs the trials; default: the tree as it is.",
    ),
]


def say(text: str) -> None:
    """Words for a person beside the result: stderr, so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False), flush=True)
