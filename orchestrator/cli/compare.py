"""Compare arms from files alone: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.options import AsJson, Debug, print_result


def register(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="CSV files (arm,seed,metric,value; AP as fractions), reports, folders of runs.",
        ),
    ],
    reference: Annotated[
        str, typer.Option(help="The arm to compare with; default: the baseline, or the first.")
    ] = "",
    primary: Annotated[
        str, typer.Option(help="The metric that gets verdicts; default: the first.")
    ] = "",
    margin: Annotated[
        float, typer.Option(help="What is of no matter, in points of AP; 0 asks for no equality.")
    ] = 0.0,
    variance: Annotated[
        Literal["pooled", "own"], typer.Option(help="Of seeds: one for all arms, or their own.")
    ] = "pooled",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the arms of finished runs with intervals that hold at once. Needs no service."""
    from orchestrator.results.compare import compare as compared
    from orchestrator.results.measured import read_measured

    result = compared(read_measured(results), reference, primary, margin, variance)
    print_result(result.as_json(), result.text(), json)
