"""The kill matrix on real training: a process dies in a phase of a trial, and the trial must come out as if it had not.

Cells are PROCESS:PHASE. Each runs a tiny two-rank study on the local service, kills, and compares with a run without
faults: the trial ends exactly once; the last weights are equal to the bit; MLflow has each metric of each step once; no
more than one checkpoint interval is trained twice; and after `maskray down` no process is left.

    python benchmarks/chaos.py                       # every cell that exists; takes half an hour on two cores
    python benchmarks/chaos.py --cells driver:training service:queued
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator import local
from orchestrator.client import Client
from orchestrator.config import Baseline, Resources, Study, StudyView, Submission, TrialPlan
from orchestrator.mlflow_client import MLflow
from orchestrator.processes import marked_processes, recorded_child
from orchestrator.stack import mlflow_mark, ray_mark
from workers.config import apply_overrides, run_preset

STEPS, CHECKPOINT_EVERY = 24, 4
PROCESSES = ("rank", "driver", "head", "service", "mlflow")
PHASES = ("queued", "starting", "training", "checkpoint", "finishing")
CELLS = [
    f"{process}:{phase}"
    for process in PROCESSES
    for phase in PHASES
    if not (process in ("rank", "driver") and phase == "queued") and not (process == "rank" and phase == "starting")
]
PATIENCE_S = 600.0


class House:
    """A folder with a dataset and a local service, gone when it is closed."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mr"))
        self.home = self.root / ".maskray"
        self.home.mkdir()
        os.environ["HOME"] = os.environ["TMPDIR"] = str(self.root)
        tempfile.tempdir = None
        settings = {"ray_cpus": 2, "poll_s": 0.2, "grace_s": 30, "limits": {"backoff_s": 0.5}}
        (self.home / "service.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "pipelines", "data", "synth", str(self.root / "data")]
        options = ["--images", "40", "--size", "128", "--seed", "0", "--pack"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)

    def client(self) -> Client:
        return Client(local.ensure_local_service(self.root))

    def close(self) -> list[int]:
        """The processes that were left although the service was told to end."""
        local.shut_down(self.root)
        marks = [ray_mark(self.home), mlflow_mark(self.home)]
        left = [process.pid for mark in marks for process in marked_processes(mark)]
        shutil.rmtree(self.root)
        return left

    def submit(self, name: str) -> str:
        overrides = {
            "data.train": str(self.root / "data" / "train"),
            "data.val": str(self.root / "data" / "val"),
            "loop.steps": STEPS,
            "loop.global_batch": 2,
            "loop.log_every_steps": 1,
            "loop.checkpoint_every_steps": CHECKPOINT_EVERY,
        }
        plan = TrialPlan(
            key="only/seed-0",
            arm={},
            seed=0,
            baseline=True,
            identity="c" * 64,
            run=apply_overrides(run_preset("tiny"), overrides),
        )
        study = Study(name=name, baseline=Baseline(preset="tiny"), resources=Resources(ranks=2))
        with self.client() as client:
            made = client.submit(Submission(study=study, study_yaml=f"name: {name}\n", trials=(plan,), fresh=True))
        return str(made["study"])

    def until(self, what: str, condition: Callable[[StudyView], Any], study: str) -> StudyView:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with self.client() as client:
                view = client.study(study)
            if condition(view):
                return view
            if view.state not in ("active", "paused"):
                raise RuntimeError(f"study {study} is {view.state} before {what}: {view.trials[0].error}")
            time.sleep(0.05)
        raise RuntimeError(f"study {study}: no {what} in {PATIENCE_S:.0f} s; it is {view.trials[0]}")


def reached(phase: str) -> Callable[[StudyView], bool]:
    def condition(view: StudyView) -> bool:
        trial = view.trials[0]
        step = trial.progress.get("step", 0)
        match phase:
            case "queued":
                return trial.state in ("queued", "starting")
            case "starting":
                return trial.state in ("starting", "running")
            case "training":
                return bool(step >= STEPS // 3)
            case "checkpoint":  # the first one is being written or has just appeared
                folder = Path(trial.storage, "checkpoints")
                return any(path.is_dir() for path in folder.glob("*")) if folder.exists() else False
            case _:
                return trial.progress.get("phase") in ("evaluating", "finishing")

    return condition


def kill(house: House, process: str, study: str) -> None:
    if process in ("head", "service", "mlflow"):
        child = recorded_child({"head": "ray"}.get(process, process), house.home)
        if child is None:
            raise RuntimeError(f"there is no {process} to kill")
        if process == "head":  # the part of it without which the cluster is lost
            named = [one for one in psutil.Process(child.pid).children(recursive=True) if one.name() == "gcs_server"]
            os.kill(named[0].pid, signal.SIGKILL)
        else:
            os.kill(child.pid, signal.SIGKILL)
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in marked_processes(ray_mark(house.home)):
            command = " ".join(one.cmdline())
            wanted = "workers.ray_entry" in command if process == "driver" else "TrainWorker" in command
            if wanted and (process == "rank" or study in command):
                one.kill()
                return
        time.sleep(0.05)
    raise RuntimeError(f"no process of a {process} was found")


def account(house: House, study: str) -> dict[str, Any]:
    """What a trial left behind that faults must not change."""
    with house.client() as client:
        view = client.study(study)
        ends = [event for event in client.events(study).events if event.kind in ("done", "failed", "cancelled")]
        uri = client.info().mlflow_uri
    trial = view.trials[0]
    result = json.loads(Path(trial.storage, "result.json").read_text()) if trial.state == "done" else {}
    steps = [attempt.step for attempt in trial.attempt_list]
    return {
        "state": trial.state,
        "error": trial.error,
        "ends": len(ends),
        "attempts": trial.attempts,
        "weights": result.get("weights_sha256", ""),
        "steps_of_attempts": steps,
        "metrics": metric_points(uri, study, trial.trial, trial.storage),
    }


def metric_points(uri: str, study: str, trial: str, storage: str) -> dict[str, Counter[int]]:
    """Metric -> how often each step was recorded, once everything was shipped."""
    subprocess.run([sys.executable, "-m", "workers.sync", storage], check=True, stdout=subprocess.DEVNULL)
    mlflow = MLflow(uri, timeout_s=30.0)
    run = mlflow.run_by_tag(mlflow.experiment(study, {}), "maskray.trial", trial)
    found: dict[str, Counter[int]] = {}
    if run is not None:
        for metric in run["data"].get("metrics", []):
            if metric["key"].startswith("loss/"):
                history = mlflow.history(run["info"]["run_id"], metric["key"])
                found[metric["key"]] = Counter(int(point["step"]) for point in history)
    mlflow.close()
    return found


def judge(cell: str, ours: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """What went wrong in a cell, in words."""
    wrong = []
    if ours["state"] != "done" or ours["ends"] != 1:
        wrong.append(f"ended {ours['ends']} times, {ours['state']}: {ours['error']}")
    if ours["weights"] != reference["weights"]:
        wrong.append("the last weights differ from the run without faults")
    if cell.startswith(("service", "mlflow")) and ours["attempts"] != 1:
        wrong.append(f"took {ours['attempts']} attempts, although no rank was touched")
    for name, points in reference["metrics"].items():
        seen = ours["metrics"].get(name, Counter())
        if set(seen) != set(points):
            wrong.append(f"{name}: steps {sorted(set(points) ^ set(seen))[:5]} are missing or too many")
        twice = [step for step, count in seen.items() if count > 1]
        if len(twice) > CHECKPOINT_EVERY + 1:
            wrong.append(f"{name}: {len(twice)} steps were recorded twice, more than a checkpoint interval")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="*", default=CELLS, help=f"of {', '.join(CELLS)}")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    unknown = [cell for cell in arguments.cells if cell not in CELLS]
    if unknown:
        parser.error(f"no cell {unknown[0]!r}; there are {', '.join(CELLS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    house = House()
    results: dict[str, list[str]] = {}
    try:
        plain = house.submit("plain")
        house.until("its end", lambda view: view.state == "done", plain)
        reference = account(house, plain)
        for cell in arguments.cells:
            process, phase = cell.split(":")
            begin = time.monotonic()
            study = house.submit(f"{process}-{phase}")
            try:
                house.until(phase, reached(phase), study)
                kill(house, process, study)
                house.until("its end", lambda view: view.state in ("done", "failed", "cancelled"), study)
                ours = account(house, study)
                results[cell] = judge(cell, ours, reference)
                detail = f"{ours['attempts']} attempts, steps {ours['steps_of_attempts']}"
            except (RuntimeError, IndexError) as error:
                results[cell], detail = [str(error)], ""
            words = "; ".join(results[cell]) or "as if nothing had happened"
            print(f"{cell:20} {words} ({detail}, {time.monotonic() - begin:.0f} s)", flush=True)
    finally:
        left = house.close()
    if left:
        results["left behind"] = [f"processes {left}"]
    passed = sum(not wrong for wrong in results.values())
    report = {
        "name": "kill matrix: cells that end as if nothing had happened",
        "ours": passed,
        "peer": len(results),
        "ratio": passed / len(results) if results else 0.0,
        "device": "cpu",
        "pairs": len(results),
        "failed": {cell: wrong for cell, wrong in results.items() if wrong},
    }
    print(json.dumps(report))
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
