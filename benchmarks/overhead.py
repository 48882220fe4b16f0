"""What tracking, a dead tracking server and checkpoints cost a step, and whether memory stays flat.

    python benchmarks/overhead.py --part tracking --pairs 2 [--json]
    python benchmarks/overhead.py --part memory --memory-steps 5000 [--json]

The `tiny` preset trains on one thread: 8 images of 128 px a step, metrics averaged over 50 steps,
as by default. Four arms alternate in one process: untracked, tracked, tracked with a dead server,
and untracked with a checkpoint at step 50. Each is timed over one window of 50 steps. All arms take
the same steps on the same images, so the untracked run is the peer.

Two runs of the same steps differ by more than tracking costs. So tracking is also counted directly:
an untracked run spools the same records, and a tracked run adds the CPU time of its shipper thread.
In the same way a checkpoint costs what the five steps after it take longer than the same steps
without a checkpoint.
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
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch

from contract.attempt import MLflowTracking, NoTracking, Progress, RunSpec, Tracking
from contract.presets import run_preset
from contract.recipe import apply_overrides, parse_run
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from workers.training.run import run_trial
from workers.training.world import World
from workers.trial.stop import StopRequest

DEAD_SERVER = "http://127.0.0.1:9"  # the discard port: nobody listens
NEVER = 1_000_000
FIRST, LAST, STEPS = 10, 60, 62  # the steps timed, and all of a run
MEMORY_LOG = 50


@dataclass(frozen=True)
class Mark:
    """Taken at a report of progress. CPU seconds are of the process and of its shipper thread."""

    cpu_s: float
    shipper_s: float
    wall_s: float
    memory_kib: float


class Stopwatch:
    """Takes a mark at each report. step_s: wall seconds of every step, from the run's series."""

    def __init__(self) -> None:
        self.marks: dict[int, Mark] = {}
        self.step_s: dict[int, float] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "training":
            memory = psutil.Process().memory_info().rss / 2**10
            shippers = [
                t.ident
                for t in threading.enumerate()
                if t.name == "shipper" and t.ident is not None
            ]
            shipper_s = sum(
                time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in shippers
            )
            mark = Mark(time.process_time(), shipper_s, time.perf_counter(), memory)
            self.marks[progress.step] = mark
            if progress.step % 500 == 0:
                print(f"step {progress.step}: {mark}", file=sys.stderr, flush=True)

    def per_step(self, name: str) -> float:
        """Seconds of a step, mean over the timed window."""
        began, ended = (getattr(self.marks[step], name) for step in (FIRST, LAST))
        return float(ended - began) / (LAST - FIRST)


def synthetic(folder: Path, side: int) -> dict[str, Any]:
    """Packs a training and a small validation set of images of `side` px. Overrides name them."""
    synthesise(folder, num_images=60, size=side, seed=0)
    for name in ("train", "val"):
        annotations = [folder / "annotations" / f"instances_{name}.json"]
        pack(annotations, str(folder / "images" / name), str(folder / name), PackOptions())
    return {"data.train": str(folder / "train"), "data.val": str(folder / "val")}


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Runs an MLflow server for the length of the block. Gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/files",
    ]
    with (folder / "server.log").open("wb") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # starts sooner
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
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
    """Runs the tiny preset from beginning to end."""
    run = parse_run(apply_overrides(run_preset("tiny"), overrides), "benchmark")
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        spec = RunSpec(run=run, storage=folder, trial=Path(folder).name, tracking=tracking)
        outcome = run_trial(spec, World(0, 1, torch.device("cpu")), StopRequest(), watch)
        assert outcome.state == "done", outcome.error
        series = pq.read_table(f"{folder}/artifacts/series.parquet")
    watch.step_s = dict(zip(series["step"].to_pylist(), series["step_s"].to_pylist(), strict=True))
    return watch


def tracking_cost(folder: Path, pairs: int) -> dict[str, Any]:
    """CPU and wall seconds a step of every arm, and what a checkpoint costs."""
    base = {
        **synthetic(folder / "data", 128),
        "loop.steps": STEPS,
        "loop.checkpoint_every_steps": NEVER,
    }
    with mlflow_server(folder) as uri:
        on = MLflowTracking(uri=uri, experiment="overhead")
        arms: dict[str, tuple[dict[str, Any], Tracking]] = {
            "off": (base, NoTracking()),
            "on": (base, on),
            "dead": (base, MLflowTracking(uri=DEAD_SERVER, experiment="overhead")),
            "checkpoints": ({**base, "loop.checkpoint_every_steps": 50}, NoTracking()),
        }
        measured({**base, "loop.steps": 20}, on)  # imports MLflow and warms the caches
        watches_of = alternated(arms, pairs)
    costs = [
        sum(with_one.step_s[step] - without.step_s[step] for step in range(51, 56))
        for with_one, without in zip(watches_of["checkpoints"], watches_of["off"], strict=True)
    ]
    window_s = statistics.median(watch.per_step("wall_s") for watch in watches_of["off"]) * (
        LAST - FIRST
    )
    return {
        "steps_timed": LAST - FIRST,
        "pairs": pairs,
        **{
            f"{name}_per_step": {
                a: statistics.median(w.per_step(name) for w in watches)
                for a, watches in watches_of.items()
            }
            for name in ("cpu_s", "wall_s", "shipper_s")
        },
        "checkpoint_s": costs,
        "checkpoint_share_of_wall": statistics.median(costs) / window_s,
    }


def memory_growth(folder: Path, steps: int) -> dict[str, Any]:
    """Resident memory over a run of one 64 px image a step; its slope after the first quarter."""
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
    dead = measured(
        {**overrides, "loop.steps": steps // 5},
        MLflowTracking(uri=DEAD_SERVER, experiment="memory"),
    )
    print(f"dead server: {shares(dead)}", file=sys.stderr, flush=True)
    with mlflow_server(folder) as uri:
        watch = measured(overrides, MLflowTracking(uri=uri, experiment="memory"))
    marks = [(step, mark.memory_kib) for step, mark in watch.marks.items() if step >= steps // 4]
    slope = statistics.linear_regression(*zip(*marks, strict=True)).slope
    quarter, end = marks[0][1], marks[-1][1]
    return {
        "steps": steps,
        "kib_per_1000_steps": slope * 1000,
        "mib": [quarter / 2**10, end / 2**10],
        "on": shares(watch),
        "dead": shares(dead),
    }


def shares(watch: Stopwatch) -> dict[str, float]:
    """CPU seconds a step after the first hundred steps, and the shipper's part of them."""
    steps = [step for step in watch.marks if step >= 100]
    began, ended = watch.marks[steps[0]], watch.marks[steps[-1]]
    cpu_s, shipper_s = ended.cpu_s - began.cpu_s, ended.shipper_s - began.shipper_s
    count = steps[-1] - steps[0]
    return {
        "cpu_s_per_step": cpu_s / count,
        "shipper_s_per_step": shipper_s / count,
        "share": shipper_s / cpu_s,
    }


def alternated(
    arms: dict[str, tuple[dict[str, Any], Tracking]], pairs: int
) -> dict[str, list[Stopwatch]]:
    """Runs each arm once a round, in reverse order every other round."""
    watches: dict[str, list[Stopwatch]] = {arm: [] for arm in arms}
    for number in range(pairs):
        for arm in list(arms)[:: 1 if number % 2 == 0 else -1]:
            watch = measured(*arms[arm])
            watches[arm].append(watch)
            seconds = ", ".join(
                f"{name} {watch.per_step(name):.5f}" for name in ("cpu_s", "wall_s", "shipper_s")
            )
            after = [round(watch.step_s[step], 3) for step in range(49, 57)]
            print(
                f"round {number}, {arm}: {seconds} a step; steps 49 to 56 {after}",
                file=sys.stderr,
                flush=True,
            )
    return watches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["tracking", "memory"], default="", help="(default: all)")
    parser.add_argument("--pairs", type=int, default=2)
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
    tracking = parts.get("tracking", {})
    peer = tracking.get("cpu_s_per_step", {}).get("off")
    ours = peer + tracking["shipper_s_per_step"]["on"] if peer else None
    line = {
        "name": "CPU seconds a step, tracked (counted) against untracked",
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours if ours else None,
        "device": "cpu",
        "pairs": arguments.pairs,
        **parts,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
