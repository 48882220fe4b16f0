"""Several gloo ranks as processes of a fork server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import workers.training.run  # noqa: F401 - imported so that the fork server holds it
from workers.training.world import World, join_world

_PATIENCE_S = 240


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on every rank; the results in the order of ranks.

    A rank that raises gives its exception, one that is killed gives None. No process outlives the
    call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(function, r, size, folder, arguments))
            for r in range(size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(_PATIENCE_S)
            files = [folder / f"{rank}.pickle" for rank in range(size)]
            return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(function: Any, rank: int, size: int, folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    world: World = join_world()
    try:
        result = function(world, *arguments)
    except Exception as error:  # noqa: BLE001 - handed to the test
        traceback.print_exc()
        result = RuntimeError(str(error))
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
