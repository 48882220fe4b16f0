"""Commands that show what the service does: status, watch, logs, queue."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from contract.command import SUCCESS, WORK_FAILED
from contract.words import printable
from orchestrator.cli.ids import open_client, study_id, trial_id
from orchestrator.cli.options import AsJson, Debug, JsonLines, StudyId, TrialId, print_json, say

_POLL_S = 1.0  # between two looks at a log that ends where it ended before


def register(app: typer.Typer) -> None:
    for command in (status, watch, logs, queue):
        app.command()(command)


def status(
    study: Annotated[
        str, typer.Argument(metavar="[STUDY_ID]", help="Without it: all studies.")
    ] = "",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show all studies, or the trials of one."""
    from orchestrator.cli import tables

    client = open_client()
    if study:
        view = client.study(study_id(client, study))
        page = client.page_link(view.study)
        try:
            kept = client.keeps(view.study)
            disk, words = (
                kept.model_dump(include={"folder", "bytes", "whole"}),
                tables.size_of(kept),
            )
        except (ValueError, RuntimeError) as error:  # a trial's folder that nobody can walk
            disk, words = {}, f"not known: {error}"
        if json:
            print_json({**view.model_dump(), "page": page, "disk": disk})
        else:
            tables.print_study(view)
            print(f"page: {page}")
            print(f"disk: {words}")
        return
    # The table counts trials by state, so it does not ask for the trials themselves.
    views = client.studies(trials=json)
    if json:
        print_json({"studies": [view.model_dump() for view in views]})
    else:
        tables.print_studies(views, client.where())


def watch(study: StudyId, json: JsonLines = False, debug: Debug = False) -> int:
    """Follow a study live until it ends; ends with 1 if it failed or was cancelled."""
    from orchestrator.cli import tables
    from orchestrator.cli.follow import follow

    client = open_client()
    view = follow(client, study_id(client, study), mode="json" if json else "live")
    if not json:
        tables.print_study(view)
    return WORK_FAILED if view.state in ("failed", "cancelled") else SUCCESS


def logs(
    trial: TrialId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing until the trial ends.")
    ] = False,
    attempt: Annotated[int, typer.Option(help="Attempt number; 0 is the newest.")] = 0,
    rank: Annotated[int, typer.Option(help="Rank; -1 is the driver that starts the ranks.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with -f one a line.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the log of one rank of a trial."""
    client = open_client()
    named, trial = trial, trial_id(client, trial)
    offset = 0
    hinted = False
    parts: list[str] = []
    while True:
        page = client.logs(trial, attempt=attempt, rank=rank, offset=offset)
        where = {"trial": trial, "attempt": page.attempt, "rank": page.rank}
        if json and follow:
            for line in page.text.splitlines():
                print_json({**where, "line": line})
        elif json:
            parts.append(page.text)
        else:
            # A trial's output may hold sequences that move the cursor or rename the window.
            lines = page.text.replace("\r\n", "\n").replace("\r", "\n")
            print(printable(lines), end="", flush=True)
        # A page is full before the end of the log, so the end is where nothing was added.
        at_end = page.next == offset
        offset = page.next
        if not offset and not hinted:
            hinted = True  # once: with --follow the same page is asked for again and again
            say(f"trial {named}: {'nothing written' if page.attempt else 'not started'} yet")
        if at_end and (page.done or not follow):
            break
        if at_end:
            time.sleep(_POLL_S)
    if json and not follow:
        print_json({**where, "text": "".join(parts)})


def queue(json: AsJson = False, debug: Debug = False) -> None:
    """Show what runs, what waits, in which order and why."""
    from orchestrator.cli import tables

    view = open_client().queue()
    print_json(view) if json else tables.print_queue(view.running, view.queue)
