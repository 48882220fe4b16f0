"""Several gloo ranks as processes of a fork server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tests.workers.fakes
import workers.run  # noqa: F401 - imported so that the fork server holds it
from workers.world import World, join_world

_PATIENCE_S = 240


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on every rank; the results in the order of ranks.

    The result of a rank that was killed or raised is the exception or None. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        processes = [
            context.Process(target=_rank, args=(function, rank, size, meeting, arguments, results))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found: list[Any] = [None] * size
            for process in processes:
                process.join(_PATIENCE_S)
            while True:
                try:
                    rank, value = results.get(timeout=0.2)
                except queue.Empty:
                    break
                found[rank] = value
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(function: Any, rank: int, size: int, meeting: str, arguments: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    world: World = join_world()
    try:
        results.put((rank, function(world, *arguments)))
    except Exception as error:  # noqa: BLE001 - handed to the test
        traceback.print_exc()
        results.put((rank, RuntimeError(str(error))))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
