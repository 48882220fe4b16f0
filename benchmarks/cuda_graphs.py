"""A training step with and without CUDA graphs (`loop.cuda_graphs`), on one GPU.

    python benchmarks/cuda_graphs.py --images 2 8

The same steps thrice: eager, eager again and by graphs, each with its input copied one step ahead.
`difference` is the largest relative difference of a step's losses to the first run; atomic sums
make even two eager runs differ. `host_ms` is how long the host works for a step. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.work import RATE, Work, WorkerStep, batch_of, detector_of
from contract.recipe import LoopConfig
from model.structures import Batch
from workers.training.graphs import by_graphs_or_eager, own_stream
from workers.training.prefetch import on_device
from workers.training.step import accumulate_gradients, apply_gradients

WARM_UP_STEPS = 6  # two eager ones of the canvas, the capture, and a few more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="r50-fpn")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--canvas", type=int, nargs=2, default=[800, 1344])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    answer: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        **{key: value for key, value in vars(arguments).items() if key != "images"},
    }
    for images in arguments.images:
        eager, again, graphs = (trained(arguments, images, by) for by in (False, False, True))
        row = {
            "eager_ms": eager["ms"],
            "graphs_ms": graphs["ms"],
            "ratio": round(eager["ms"] / graphs["ms"], 3),
            "eager_host_ms": eager["host_ms"],
            "graphs_host_ms": graphs["host_ms"],
            "eager_reserved_gib": eager["reserved_gib"],
            "graphs_reserved_gib": graphs["reserved_gib"],
            "captured": graphs["captured"],
            "first_loss": [run["losses"][0][0] for run in (eager, again, graphs)],
            "difference_eager": difference(eager, again),
            "difference_graphs": difference(eager, graphs),
        }
        print(images, row, flush=True)
        answer[f"images_{images}"] = row
    print(json.dumps(answer))


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """By step: the largest relative difference of a loss."""
    return [
        round(max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(x, y, strict=True)), 6)
        for x, y in zip(one["losses"], other["losses"], strict=True)
    ]


def trained(arguments: argparse.Namespace, images: int, by_graphs: bool) -> dict[str, Any]:
    """Some steps on four batches in turn: times, memory, losses."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work = Work(arguments.preset, images, arguments.objects, tuple(arguments.canvas))
    step = WorkerStep(detector_of(work.model, "cuda"), arguments.precision)
    drawn = batch_of(work).pin_memory()
    # other samples of anchors and RoIs in each
    keys = [(drawn.noise_keys + 1000 * k).pin_memory() for k in range(4)]
    hosts = [replace(drawn, noise_keys=other) for other in keys]
    loop = LoopConfig(precision=arguments.precision, cuda_graphs=by_graphs)
    with own_stream(loop, step.world.device):
        return _steps(loop, step, hosts, arguments.steps)


def _steps(loop: LoopConfig, parts: WorkerStep, hosts: list[Batch], steps: int) -> dict[str, Any]:
    world, module, scaler = parts.world, parts.sums, parts.scaler
    accumulate = by_graphs_or_eager(
        lambda chunks, flags: accumulate_gradients(module, chunks, loop, world, scaler, flags),
        module,
        loop,
        world,
    )
    total = WARM_UP_STEPS + steps
    batches = on_device(([hosts[k % len(hosts)]] for k in range(total)), world.device)
    losses: list[Tensor] = []
    host_s = began = 0.0
    for step in range(total):
        if step == WARM_UP_STEPS:
            torch.cuda.synchronize()
            began = time.perf_counter()
        step_began = time.perf_counter()
        gradients = accumulate(next(batches), (0.0, 0.0))
        apply_gradients(
            parts.trained, parts.optimiser, scaler, RATE, 0.0, accumulate.keeps_gradients
        )
        losses.append(gradients.losses_T)
        if step >= WARM_UP_STEPS:
            host_s += time.perf_counter() - step_began
    torch.cuda.synchronize()
    ended = time.perf_counter()
    batches.close()
    captured = len(getattr(accumulate, "_graphs", {}))
    accumulate.forget()
    return {
        "ms": round(1e3 * (ended - began) / steps, 2),
        "host_ms": round(1e3 * host_s / steps, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "captured": captured,
        "losses": torch.stack(losses[:8]).cpu().tolist(),
    }


if __name__ == "__main__":
    main()
