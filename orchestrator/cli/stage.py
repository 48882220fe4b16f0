"""`maskray data stage`: a remote dataset into the cache of every node of the cluster, or of this machine alone."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from contract.answers import StagedNode, Staging
from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.options import Debug, Json, print_json, say
from orchestrator.cli.rooms import become
from orchestrator.client import Client
from orchestrator.local.connect import running_client

_POLL_S = 0.5
_PATIENCE_S = 60.0  # with a service that does not answer

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
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Fetch and verify all shards of remote datasets, ahead of a study, into the cache of every node.

    The nodes are those of the running service; without one it is this machine's cache that is filled. Name all
    datasets of a study at once: the cache must hold them together.
    """
    local = all("://" not in uri or uri.startswith("file://") for uri in uris)
    client = None if here or cache or local else running_client()
    if client is None:
        options = [*(["--json"] if json else []), *(["--debug"] if debug else [])]
        become(
            "pipelines",
            "data",
            "stage",
            *uris,
            "--cache",
            cache,
            "--cache-gib",
            f"{cache_gib:g}",
            *options,
        )
    with client:
        found = _follow(client, client.stage(uris, cache_gib), quiet=json)
    ok = all(node.state == "done" for node in found.nodes)
    if json:
        print_json({"uris": uris, "ok": ok, "nodes": [node.model_dump() for node in found.nodes]})
        return SUCCESS if ok else WORK_FAILED
    for node in found.nodes:
        print(f"{'ok  ' if node.state == 'done' else 'FAIL'}  {_name(node)}  {_words(node)}")
    return SUCCESS if ok else WORK_FAILED


def _name(node: StagedNode) -> str:
    return f"{node.address}/{node.node[:6]}"


def _words(node: StagedNode) -> str:
    if node.state != "done":
        return node.error
    where = f"{node.bytes / 2**20:.1f} MiB in {node.cache}" if node.cache else "all there already"
    return where + (f"; evicted {node.evicted} files of other datasets" if node.evicted else "")


def _follow(client: Client, found: Staging, quiet: bool) -> Staging:
    """Shows how far each node is, until all are through. Interrupted, the nodes go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = Progress(
        *columns,
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
        transient=True,
    )
    answered = time.monotonic()
    with shown:
        tasks = {node.node: shown.add_task(_name(node), total=None) for node in found.nodes}
        try:
            while any(node.state == "running" for node in found.nodes):
                time.sleep(_POLL_S)
                try:
                    found = client.staging(found.staging)
                    answered = time.monotonic()
                except RuntimeError:  # the service or Ray is busy
                    if time.monotonic() - answered > _PATIENCE_S:
                        raise
                for node in found.nodes:
                    shown.update(tasks[node.node], completed=node.done, total=node.total or None)
        except KeyboardInterrupt:
            say("the nodes go on fetching; the same command again finds what they have")
            raise
    return found
