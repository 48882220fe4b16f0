"""Seconds from submit to a trial's first step, beside a bare TorchTrainer on the same Ray head.

    python benchmarks/trial_start.py [--pairs 4] [--json]

The bare one is what a person writes without maskray: `python script.py` on the same head. It calls
`TorchTrainer(...).fit()` with the same model, data and ranks, and ends after one step. It shares
nothing with the service but the head. It has no ledger, no tracking and no checkpoint. Both clocks
begin when the person presses return and stop when rank 0 has taken its first optimiser step. The
two alternate; the figures are medians.

Beside the times it reports private memory (USS) of the service, and of what a running trial adds to
its ranks: its driver, and Ray's supervisor of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from contract.presets import run_preset
from contract.recipe import apply_overrides
from contract.study import Baseline, Resources, Study, Submission, TrialPlan
from orchestrator.client import Client
from orchestrator.local import connect as local
from orchestrator.local.processes import marked_processes, recorded_child
from orchestrator.local.stack import ray_mark

RANKS = 1
PATIENCE_S = 240.0


# --- the peer -----------------------------------------------------------------------------------


def bare(run: dict[str, Any], out: str) -> None:
    """A script without maskray: one worker group, one step."""
    import ray
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    TorchTrainer(
        bare_step,
        train_loop_config={"run": run, "out": out},
        scaling_config=ScalingConfig(num_workers=RANKS, resources_per_worker={"CPU": 1}),
        run_config=TrainRunConfig(name="bare", storage_path=str(Path(out).parent)),
    ).fit()


def bare_step(config: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import prepare_model

    from contract.recipe import RunConfig
    from model.accelerate import accelerate
    from model.build import build_detector
    from pipelines.load.loader import TrainLoader
    from pipelines.shards.dataset import open_dataset

    run = RunConfig.model_validate(config["run"])
    built = build_detector(run.model, run.seed)
    accelerate(built)
    detector = prepare_model(built)
    optimiser = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    loader = TrainLoader(
        run.data,
        open_dataset(run.data.train),
        seed=run.seed,
        global_batch=run.loop.global_batch,
        rank=0,
        world_size=RANKS,
        max_images_per_forward=run.loop.max_images_per_forward,
        masks=True,
    )
    for batch in next(iter(loader)).batches:
        sum(
            term.weight * term.sum / term.count.clamp(min=1) for term in detector(batch).values()
        ).backward()
    optimiser.step()
    Path(config["out"]).write_text(repr(time.time()))
    loader.close()


# --- measuring ----------------------------------------------------------------------------------


class LocalSystem:
    """A folder with a dataset and a local service. `close` removes both."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mr"))
        self.home = self.root / ".maskray"
        self.home.mkdir()
        os.environ["HOME"] = os.environ["TMPDIR"] = str(self.root)
        tempfile.tempdir = None
        (self.home / "service.yaml").write_text(yaml.safe_dump({"ray_cpus": 2, "idle_minutes": 0}))
        command = [sys.executable, "-m", "pipelines", "data", "synth", str(self.root / "data")]
        options = ["--images", "40", "--size", "128", "--seed", "0", "--pack"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        overrides: dict[str, Any] = {
            "data.train": str(self.root / "data" / "train"),
            "data.val": str(self.root / "data" / "val"),
            "loop.steps": 2,
            "loop.global_batch": 2,
            "loop.log_every_steps": 1,
        }
        self.run = apply_overrides(run_preset("tiny"), overrides)
        self.client = Client(local.ensure_local_service(self.root))
        self.until(lambda: self.client.info().cluster.nodes)

    def close(self) -> None:
        self.client.close()
        local.shut_down(self.root)
        shutil.rmtree(self.root)

    def until(self, condition: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        raise RuntimeError(f"not within {PATIENCE_S:.0f} s; see {self.home}/service-process.log")

    def ours(self, number: int) -> tuple[float, dict[str, float]]:
        """Seconds to the first step by rank 0's progress file, and MiB while the trial runs."""
        plan = TrialPlan(
            key=f"t{number}", arm={}, seed=0, baseline=True, identity="c" * 64, run=self.run
        )
        study = Study(
            name="start", baseline=Baseline(preset="tiny"), resources=Resources(ranks=RANKS)
        )
        begin = time.time()
        made = self.client.submit(
            Submission(study=study, study_yaml="name: start\n", trials=(plan,), fresh=True)
        )
        folder = self.home / "studies" / made.study / f"{made.study}-000"
        at = self.until(lambda: _first_step(folder / "progress.json"))
        memory = self.memory()
        self.until(lambda: self.client.study(made.study).state != "active")
        if self.client.study(made.study).state != "done":
            raise RuntimeError(self.client.study(made.study).trials[0].error)
        return at - begin, memory

    def bare(self, number: int) -> float:
        out, head = self.root / f"bare-{number}", recorded_child("ray", self.home)
        assert head is not None
        (self.root / "run.json").write_text(json.dumps(self.run))
        gcs = next(
            word for word in psutil.Process(head.pid).cmdline() if word.startswith("--port=")
        )
        environment = {
            **os.environ,
            "RAY_ADDRESS": f"127.0.0.1:{gcs.removeprefix('--port=')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "ray-token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        begin = time.time()
        command = [sys.executable, __file__, "--bare", str(self.root / "run.json"), str(out)]
        with (self.root / "bare.log").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise RuntimeError((self.root / "bare.log").read_text()[-2000:])
        return float(out.read_text()) - begin

    def memory(self) -> dict[str, float]:
        service = recorded_child("service", self.home)
        assert service is not None
        jobs = {"driver": 0.0, "supervisor": 0.0}
        for process in marked_processes(ray_mark(self.home)):
            words = " ".join(process.cmdline())
            kind = (
                "driver"
                if "workers.ray_entry" in words
                else "supervisor"
                if "JobSupervisor" in words
                else ""
            )
            if kind:
                jobs[kind] = max(jobs[kind], _mib(process))
        return {"service": _mib(psutil.Process(service.pid)), **jobs}


def _first_step(file: Path) -> float:
    try:
        progress = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return 0.0
    return float(progress["updated_at"]) if progress["step"] >= 1 else 0.0


def _mib(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss / 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--bare", nargs=2, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.bare:
        bare(json.loads(Path(arguments.bare[0]).read_text()), arguments.bare[1])
        return 0
    system = LocalSystem()
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    try:
        system.ours(0)  # not counted: the first trial also waits for MLflow to start
        for number in range(1, arguments.pairs + 1):
            seconds, memory = system.ours(number)
            times["ours"].append(seconds)
            times["bare"].append(system.bare(number))
            if not arguments.json:
                last = {name: f"{values[-1]:.1f} s" for name, values in times.items()}
                print(f"pair {number}: ours {last['ours']}, bare {last['bare']}", flush=True)
    finally:
        system.close()
    ours, peer = (statistics.median(times[name]) for name in ("ours", "bare"))
    line = {
        "name": "seconds from submit to the first step of a trial, beside a bare TorchTrainer",
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "device": "cpu",
        "pairs": arguments.pairs,
        "memory_mib": memory,
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
