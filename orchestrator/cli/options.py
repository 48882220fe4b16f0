"""Options and arguments that several commands share, and the one way they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:  # importing pydantic takes longer than all of `maskray --help`
    from pydantic import BaseModel

AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
JsonLines: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
StudyFile: TypeAlias = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).")]
StudyId: TypeAlias = Annotated[
    str, typer.Argument(metavar="STUDY_ID", help="Id of a study; 'last' is the newest.")
]
TrialId: TypeAlias = Annotated[
    str, typer.Argument(metavar="TRIAL_ID", help="Id of a trial, or STUDY_ID:KEY.")
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
    """Words for a person beside the result: on stderr, so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: BaseModel | Mapping[str, Any]) -> None:
    """One line of JSON. Raises ValueError for nan and infinity, which are no JSON."""
    plain = value if isinstance(value, Mapping) else value.model_dump()
    print(json.dumps(plain, allow_nan=False), flush=True)  # a pipe gets each line at once


def print_result(value: BaseModel | Mapping[str, Any], text: str, json: bool) -> None:
    """The result of a command: `value` for a program, or `text` for a person."""
    if json:
        print_json(value)
    else:
        print(text)
