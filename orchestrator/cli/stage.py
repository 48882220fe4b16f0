"""`maskray data stage`: fetch a remote dataset into the cache of every node, or of this machine."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from contract.answers import StagedNode, Staging
from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.options import AsJson, Debug, print_json, say
from orchestrator.cli.programs import become
from orchestrator.client import Client
from orchestrator.local.connect import running_client

_POLL_S = 0.5
_GIVE_UP_S = 60.0  # of a service or a Ray head that does not answer

stage_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@stage_app.command()
def stage(
    uris: Annotated[
        list[str],
        typer.Argument(metavar="URI...", help="Packed datasets: folders, s3://... or gs://..."),
    ],
    cache_gib: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Size cap of the cache.")
    ] = 20.0,
    here: Annotated[
        bool, typer.Option("--here", help="This machine alone, although a service runs.")
    ] = False,
    cache: Annotated[
        str, typer.Option(help="Another cache folder than training's own; implies --here.")
    ] = "",
    json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Fetch and verify all shards of remote datasets, ahead of a study, into the cache of every
    node.

    The nodes are those of the running service; without one it is this machine's cache that is
    filled. Name all datasets of a study at once: the cache must hold them together.
    """
    # Folders are read where they are: there is nothing to fetch, so no service is asked.
    local = all("://" not in uri or uri.startswith("file://") for uri in uris)
    client = None if here or cache or local else running_client()
    if client is None:
        options = [*(["--json"] if json else []), *(["--debug"] if debug else [])]
        limits = ["--cache", cache, "--cache-gib", f"{cache_gib:g}"]
        become("pipelines", "data", "stage", *uris, *limits, *options)
    with client:
        staging = _follow(client, client.stage(uris, cache_gib), quiet=json)
    ok = all(node.state == "done" for node in staging.nodes)
    if json:
        nodes = [node.model_dump() for node in staging.nodes]
        print_json({"uris": uris, "ok": ok, "nodes": nodes})
        return SUCCESS if ok else WORK_FAILED
    for node in staging.nodes:
        print(f"{'ok  ' if node.state == 'done' else 'FAIL'}  {_name(node)}  {_words(node)}")
    return SUCCESS if ok else WORK_FAILED


def _name(node: StagedNode) -> str:
    return f"{node.address}/{node.node[:6]}"


def _words(node: StagedNode) -> str:
    if node.state != "done":
        return node.error
    where = f"{node.bytes / 2**20:.1f} MiB in {node.cache}" if node.cache else "all there already"
    return where + (f"; evicted {node.evicted} files of other datasets" if node.evicted else "")


def _follow(client: Client, staging: Staging, quiet: bool) -> Staging:
    """Shows how far each node is, until all have ended. After an interrupt the nodes go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Progress(
        *columns,
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    )
    answered = time.monotonic()
    with bars:
        tasks = {node.node: bars.add_task(_name(node), total=None) for node in staging.nodes}
        try:
            # Polled: a job's progress is in its log, and Ray tells nobody of a new line.
            while any(node.state == "running" for node in staging.nodes):
                time.sleep(_POLL_S)
                try:
                    staging = client.staging(staging.staging)
                    answered = time.monotonic()
                except RuntimeError:  # a busy service or Ray head answers again
                    if time.monotonic() - answered > _GIVE_UP_S:
                        raise
                for node in staging.nodes:
                    bars.update(tasks[node.node], completed=node.done, total=node.total or None)
        except KeyboardInterrupt:
            say("the nodes go on fetching; the same command again finds what they have")
            raise
    return staging
