"""Thirty SIGKILLs of real runs, in five groups of six.

No bit of the weights and no point of any curve may change.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from contract.files import Files
from tests.workers.test_train import run_file, train_command
from workers.sync import sync
from workers.tracking.spool import DESTINATION_FILE, Destination
from workers.train import next_attempt

STEPS, EVALUATED, LOGGED = 72, 24, 2
RANKS = (1, 2, 3, 1, 2)  # of the groups
DEAD_SERVER = "http://127.0.0.1:9"  # the discard port: nobody listens
_PATIENCE_S = 300


class Training:
    """A run in a folder that a test can start, watch and kill."""

    def __init__(self, folder: Path, packed: tuple[str, str], ranks: int, tracker: str) -> None:
        folder.mkdir(exist_ok=True)
        self.out, self._ranks, self._tracker = folder / "out", ranks, tracker
        self._log = folder / "log"
        self._run = run_file(
            folder,
            packed,
            loop__steps=STEPS,
            loop__global_batch=3,
            loop__log_every_steps=LOGGED,
            loop__eval_every_steps=EVALUATED,
            loop__checkpoint_every_steps=6,
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = train_command(
            str(self._run), "--out", str(self.out), "--mlflow", self._tracker, ranks=self._ranks
        )
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
            )

    def finish(self) -> dict[str, Any]:
        """To the end; the run's result."""
        assert self.start().wait(_PATIENCE_S) == 0, self._log.read_text()[-3000:]
        result: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return result

    def kill(self, moment: str, victim: str, chance: random.Random) -> bool:
        """Starts, waits for the moment and kills. Returns whether the run was still alive then."""
        attempt, _ = next_attempt(Files(str(self.out)))
        process = self.start()
        first: list[int] = []

        def reached() -> bool:
            progress = self._progress()
            if progress.get("attempt") != attempt:
                return moment == "start" and next_attempt(Files(str(self.out)))[0] > attempt
            match moment:
                case "training":
                    first.append(progress["step"])
                    return progress["phase"] == "training" and progress["step"] >= first[0] + 10
                case "checkpoint":
                    return any(self.out.glob("checkpoints/*/.*.part"))
                case _:
                    return moment in ("start", progress["phase"])

        until = time.monotonic() + _PATIENCE_S
        while process.poll() is None and not reached():
            assert time.monotonic() < until, f"{moment}: not within {_PATIENCE_S} s"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, {"start": 2.0, "checkpoint": 0.01}.get(moment, 0.3)))
        return end(process, victim, chance)

    def _progress(self) -> dict[str, Any]:
        try:
            progress: dict[str, Any] = json.loads((self.out / "progress.json").read_text())
        except FileNotFoundError:
            return {}
        return progress


def end(process: subprocess.Popen[bytes], victim: str, chance: random.Random) -> bool:
    """Kills the launcher, one rank or all of them at once, and checks that none is left."""
    if process.poll() is not None:
        return False
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ranks = family[1:] or family
    for doomed in {"launcher": family[:1], "rank": [chance.choice(ranks)], "all": family}[victim]:
        try:
            doomed.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    status = process.wait(_PATIENCE_S)  # of a rank: the others end within bounded time
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    return status != 0


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, packed: tuple[str, str]
) -> Callable[[int], Training]:
    """The run that is never killed, by its number of ranks."""
    runs: dict[int, Training] = {}

    def of(ranks: int) -> Training:
        if ranks not in runs:
            runs[ranks] = Training(tmp_path_factory.mktemp("whole"), packed, ranks, DEAD_SERVER)
            runs[ranks].finish()
        return runs[ranks]

    return of


def points_of(uri: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric's history in the one run of the store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {
        name: sorted(
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }


@pytest.mark.slow
@pytest.mark.parametrize("group", range(5))
def test_six_kills_change_no_bit_and_no_point(tmp_path, packed, whole, empty_store, group):
    """Even groups have a tracker that is dead until `maskray sync`, odd ones a live one."""
    chance, ranks = random.Random(group), RANKS[group]
    store = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    killed = Training(tmp_path, packed, ranks, store if group % 2 else DEAD_SERVER)
    moments = [
        "start",
        *chance.sample(["start", "training", "checkpoint", "evaluating"], k=4),
        "finishing",
    ]
    victims = [
        chance.choice(["launcher", "rank", "all"] if ranks > 1 else ["all"]) for _ in moments
    ]
    hits = [
        killed.kill(moment, victim, chance) for moment, victim in zip(moments, victims, strict=True)
    ]
    print(f"{ranks} rank(s): {list(zip(moments, victims, hits, strict=True))}")
    assert all(hits)
    result, reference = killed.finish(), json.loads((whole(ranks).out / "result.json").read_text())
    assert result["weights_sha256"] == reference["weights_sha256"]
    assert result["metrics"]["bbox/AP"] == reference["metrics"]["bbox/AP"]

    series, wanted = (
        pq.read_table(run.out / "artifacts/series.parquet") for run in (killed, whole(ranks))
    )
    assert series["step"].to_pylist() == list(range(1, STEPS + 1))
    for name in ("loss", "loss/mask", "grad_norm", "lr"):
        assert series[name].to_pylist() == wanted[name].to_pylist()

    if group % 2 == 0:
        target = killed.out / "spool" / DESTINATION_FILE
        dead = Destination.model_validate_json(target.read_text())
        alive = dead.model_copy(
            update={"tracking": dead.tracking.model_copy(update={"uri": store})}
        )
        target.write_text(alive.model_dump_json())
        assert sync(str(killed.out)) > 0
    points = points_of(store)
    assert [step for step, _ in points["loss"]] == [50, STEPS]
    assert [step for step, _ in points["bbox/AP"]] == list(range(EVALUATED, STEPS + 1, EVALUATED))
    assert [step for step, _ in points["system/rank-0/memory_gib"]] == list(
        range(LOGGED, STEPS + 1, LOGGED)
    )
