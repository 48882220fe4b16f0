"""What tracking, a dead tracking server and checkpoints cost a step; whether memory stays flat.

    python benchmarks/overhead.py [--steps 120] [--pairs 3] [--memory-steps 5000] [--json]

Ours is a tracked run, the peer the same run untracked, alternating in one process; CPU seconds are of all its threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.pack import PackOptions, pack
from pipelines.synth import synthesise
from workers.config import (
    MLflowTracking,
    NoTracking,
    Progress,
    RunSpec,
    Tracking,
    apply_overrides,
    parse_run,
    run_preset,
)
from workers.run import run_trial
from workers.stop import StopRequest
from workers.world import World

DEAD_SERVER = "http://127.0.0.1:9"  # the discard port: nobody listens


def synthetic(folder: Path) -> tuple[str, str]:
    synthesise(folder, num_images=60, size=64, seed=0)
    for name in ("train", "val"):
        annotations = [folder / "annotations" / f"instances_{name}.json"]
        pack(annotations, str(folder / "images" / name), str(folder / name), PackOptions())
    return str(folder / "train"), str(folder / "val")


class Stopwatch:
    """CPU and wall seconds, and memory, between the first report of training and the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float, float, float]] = []

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "training":
            memory = psutil.Process().memory_info().rss / 2**20
            self.marks.append((progress.step, time.process_time(), time.perf_counter(), memory))

    def per_step(self) -> tuple[float, float]:
        (first, cpu0, wall0, _), (last, cpu1, wall1, _) = self.marks[1], self.marks[-1]
        return (cpu1 - cpu0) / (last - first), (wall1 - wall0) / (last - first)


def measured(data: tuple[str, str], steps: int, tracking: Tracking, every: int, quiet: Callable[..., Any]) -> Stopwatch:
    """One run of the tiny preset at 64 px, two images a step, with a checkpoint every `every` steps."""
    overrides = {
        "data.train": data[0],
        "data.val": data[1],
        "data.short_sides_px": [64],
        "data.max_side_px": 64,
        "model.image.short_side_px": 64,
        "loop.steps": steps,
        "loop.global_batch": 2,
        "loop.checkpoint_every_steps": every,
        "loop.log_every_steps": 10,
    }
    run = parse_run(apply_overrides(run_preset("tiny"), overrides), "benchmark")
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        spec = RunSpec(run=run, storage=folder, trial=Path(folder).name, tracking=tracking)
        outcome = quiet(run_trial, spec, World(0, 1, torch.device("cpu")), StopRequest(), watch)
    assert outcome.state == "done", outcome.error
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--memory-steps", type=int, default=5000, help="0 leaves memory out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("off", "on", "dead", "checkpoints")}
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = synthetic(folder)
        never = arguments.steps + 1
        on = MLflowTracking(uri=f"sqlite:///{folder}/mlflow.db", experiment="overhead", step_metrics_every=10)
        dead = MLflowTracking(uri=DEAD_SERVER, experiment="overhead", step_metrics_every=10)
        arms: dict[str, tuple[Tracking, int]] = {
            "off": (NoTracking(), never),
            "on": (on, never),
            "dead": (dead, never),
            "checkpoints": (NoTracking(), 50),
        }
        measured(data, 20, on, never, _quietly)  # imports MLflow and warms the caches
        for _ in range(arguments.pairs):
            for arm, (tracking, every) in arms.items():
                found[arm].append(measured(data, arguments.steps, tracking, every, _quietly).per_step())
        if arguments.memory_steps:
            watch = measured(data, arguments.memory_steps, NoTracking(), 1000, _quietly)
            memory = [mark[3] for mark in watch.marks]
    cpu = {arm: statistics.median(value[0] for value in values) for arm, values in found.items()}
    wall = {arm: statistics.median(value[1] for value in values) for arm, values in found.items()}
    details = {
        "cpu_s_per_step": cpu,
        "wall_s_per_step": wall,
        "checkpoint_share_of_wall": wall["checkpoints"] / wall["off"] - 1,
        "memory_mib": [memory[len(memory) // 5], memory[-1]] if memory else [],
    }
    if not arguments.json:
        for arm in cpu:
            print(f"{arm:12} {cpu[arm] * 1000:8.2f} ms CPU  {wall[arm] * 1000:8.2f} ms wall a step")
        print(f"a checkpoint every 50 steps costs {details['checkpoint_share_of_wall']:+.1%} of wall time")
        if memory:
            first, last = memory[len(memory) // 5], memory[-1]
            print(f"memory {first:.0f} MiB after a fifth of {arguments.memory_steps} steps, {last:.0f} MiB at the end")
    line = {
        "name": "tracking overhead in CPU seconds a step (dead server against none)",
        "ours": cpu["dead"],
        "peer": cpu["off"],
        "ratio": cpu["off"] / cpu["dead"],
        "device": "cpu",
        "pairs": arguments.pairs,
        **details,
    }
    print(json.dumps(line))


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        return function(*arguments)


if __name__ == "__main__":
    main()
