"""What tracking, a dead tracking server and checkpoints cost a step; whether memory stays flat.

    python benchmarks/overhead.py [--part tracking|memory] [--pairs 6] [--memory-steps 5000] [--json]

The `tiny` preset on one thread: 8 images of 128 px a step, metrics told every 10 steps and averaged over 50, as by
default. Four arms alternate in one process: untracked, tracked, tracked with a dead server, and untracked with a
checkpoint every 50 steps. Each is timed over one window of 50 steps; CPU seconds are of all threads. All take the same
steps on the same images, so the untracked run is the peer of the other three.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
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
NEVER = 1_000_000
FIRST, LAST, STEPS = 10, 60, 62  # the steps timed, and all of a run
MEMORY_LOG = 50


class Stopwatch:
    """CPU and wall seconds and memory (KiB), by step, at every report of training."""

    def __init__(self) -> None:
        self.marks: dict[int, tuple[float, float, float]] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "training":
            memory = psutil.Process().memory_info().rss / 2**10
            self.marks[progress.step] = (time.process_time(), time.perf_counter(), memory)

    def per_step(self, first: int, last: int) -> tuple[float, float]:
        """CPU and wall seconds of a step."""
        (cpu0, wall0, _), (cpu1, wall1, _) = self.marks[first], self.marks[last]
        return (cpu1 - cpu0) / (last - first), (wall1 - wall0) / (last - first)


def synthetic(folder: Path, side: int) -> dict[str, Any]:
    """Overrides that name a training and a small validation set of images of `side` px."""
    synthesise(folder, num_images=60, size=side, seed=0)
    for name in ("train", "val"):
        annotations = [folder / "annotations" / f"instances_{name}.json"]
        pack(annotations, str(folder / "images" / name), str(folder / name), PackOptions())
    return {"data.train": str(folder / "train"), "data.val": str(folder / "val")}


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server of its own for the length of the block; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measured(overrides: dict[str, Any], tracking: Tracking) -> Stopwatch:
    """One run of the tiny preset from beginning to end."""
    run = parse_run(apply_overrides(run_preset("tiny"), overrides), "benchmark")
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        spec = RunSpec(run=run, storage=folder, trial=Path(folder).name, tracking=tracking)
        outcome = run_trial(spec, World(0, 1, torch.device("cpu")), StopRequest(), watch)
    assert outcome.state == "done", outcome.error
    return watch


def tracking_cost(folder: Path, pairs: int) -> dict[str, Any]:
    """CPU and wall seconds a step of every arm."""
    base = {**synthetic(folder / "data", 128), "loop.steps": STEPS, "loop.checkpoint_every_steps": NEVER}
    with mlflow_server(folder) as uri:
        on = MLflowTracking(uri=uri, experiment="overhead")
        arms: dict[str, tuple[dict[str, Any], Tracking]] = {
            "off": (base, NoTracking()),
            "on": (base, on),
            "dead": (base, MLflowTracking(uri=DEAD_SERVER, experiment="overhead")),
            "checkpoints": ({**base, "loop.checkpoint_every_steps": 50}, NoTracking()),
        }
        measured({**base, "loop.steps": 20}, on)  # imports MLflow and warms the caches
        return {"steps_timed": LAST - FIRST, **compared(alternated(arms, pairs), "off")}


def memory_growth(folder: Path, steps: int) -> dict[str, Any]:
    """Resident memory over a run of one 64 px image a step; its slope over the last three quarters."""
    overrides = {
        **synthetic(folder / "data", 64),
        "data.short_sides_px": [64],
        "data.max_side_px": 64,
        "model.image.short_side_px": 64,
        "model.image.max_side_px": 64,
        "loop.global_batch": 1,
        "loop.steps": steps,
        "loop.log_every_steps": MEMORY_LOG,
        "loop.checkpoint_every_steps": 250,
    }
    with mlflow_server(folder) as uri:
        watch = measured(overrides, MLflowTracking(uri=uri, experiment="memory"))
    marks = [(step, memory) for step, (_, _, memory) in watch.marks.items() if step >= steps // 4]
    slope = statistics.linear_regression(*zip(*marks, strict=True)).slope
    quarter, end = marks[0][1], marks[-1][1]
    return {"steps": steps, "kib_per_1000_steps": slope * 1000, "mib": [quarter / 2**10, end / 2**10]}


Found = dict[str, list[tuple[float, float]]]


def alternated(arms: dict[str, tuple[dict[str, Any], Tracking]], pairs: int) -> Found:
    """Each arm once a round, the order turned around every other round."""
    found: Found = {arm: [] for arm in arms}
    for number in range(pairs):
        for arm in list(arms)[:: 1 if number % 2 == 0 else -1]:
            cpu_s, wall_s = measured(*arms[arm]).per_step(FIRST, LAST)
            found[arm].append((cpu_s, wall_s))
            print(f"round {number}, {arm}: {cpu_s:.4f} CPU s, {wall_s:.4f} s a step", file=sys.stderr, flush=True)
    return found


def compared(found: Found, peer: str) -> dict[str, Any]:
    """Medians of every arm, and the medians of the ratios to `peer` of the same round."""
    result: dict[str, Any] = {"pairs": len(found[peer])}
    for index, kind in enumerate(("cpu", "wall")):
        result[f"{kind}_s_per_step"] = {a: statistics.median(v[index] for v in values) for a, values in found.items()}
        for arm in found.keys() - {peer}:
            ratios = [a[index] / b[index] - 1 for a, b in zip(found[arm], found[peer], strict=True)]
            result[f"{kind}_share_{arm}"] = statistics.median(ratios)
            result[f"{kind}_shares_{arm}"] = sorted(round(ratio, 4) for ratio in ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["tracking", "memory"], default="", help="(default: all)")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--memory-steps", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, dict[str, Any]] = {}
    for part in [arguments.part] if arguments.part else ["tracking", "memory"]:
        with tempfile.TemporaryDirectory() as folder:
            if part == "tracking":
                parts[part] = tracking_cost(Path(folder), arguments.pairs)
            else:
                parts[part] = memory_growth(Path(folder), arguments.memory_steps)
        if not arguments.json:
            print(part, json.dumps(parts[part], indent=1))
    cpu = parts.get("tracking", {}).get("cpu_s_per_step", {})
    line = {
        "name": "tracking overhead in CPU seconds a step (dead server against none)",
        "ours": cpu.get("dead"),
        "peer": cpu.get("off"),
        "ratio": cpu["off"] / cpu["dead"] if cpu else None,
        "device": "cpu",
        "pairs": arguments.pairs,
        **parts,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
