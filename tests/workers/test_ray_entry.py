"""A real Ray: one attempt that is asked to stop, and the next, of which one rank is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from contract.attempt import Outcome
from contract.files import Files
from tests.orchestrator.waiting import PATIENCE_S
from tests.workers.trials import run_of, spec_of
from workers.ray_entry import conclude, logged_to, read_spec
from workers.training.world import world_alone


class Head:
    """A Ray of its own, a node for each number of cores. All of its processes end with it."""

    def __init__(self, folder: Path, *cores: int) -> None:
        self._temporary = tempfile.mkdtemp(
            prefix="mr-", dir="/tmp"
        )  # short: Ray's sockets lie below it
        self._log = folder / "head.log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_TMPDIR": self._temporary,
            "RAY_AUTH_MODE": "disabled",
            # 127.0.0.1 stays what it is, in the driver too
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).parents[1] / "orchestrator/ray_nodes.py")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            nodes = [self.ask(add={"num_cpus": count}) for count in cores]
        except BaseException:
            self.end()
            raise
        self.environment["RAY_ADDRESS"], self._last = nodes[0]["address"], nodes[-1]["node"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text()[-3000:]
        return dict(json.loads(answer))

    def drain_last(self) -> None:
        assert self.ask(drain=self._last, seconds=120)["accepted"]

    def end(self) -> None:
        mine = [
            *psutil.Process(self._process.pid).children(recursive=True),
            psutil.Process(self._process.pid),
        ]
        mine += [
            p
            for p in psutil.process_iter(["cmdline"])
            if self._temporary in " ".join(p.info["cmdline"] or ())
        ]
        for process in mine:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.communicate()
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    started = Head(tmp_path_factory.mktemp("head"), 2)
    yield started
    started.end()


class Driver:
    """`python -m workers.ray_entry` with a run that does not end by itself; two ranks, if no more
    is said.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        packed: tuple[str, str],
        head: Head,
        environment: dict[str, str] | None = None,
        **fields: Any,
    ) -> None:
        self.attempt_folder = folder / "attempts" / str(attempt)
        self.attempt_folder.mkdir(parents=True)
        run = run_of(packed, loop__steps=1_000_000)
        gang = {"ranks": 2, "cpus_per_rank": 1, "grace_s": 20, **fields}
        spec = spec_of(folder, run, attempt=attempt, **gang)
        path = self.attempt_folder / "spec.json"
        path.write_text(spec.model_dump_json())
        self.log = self.attempt_folder / "driver.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "workers.ray_entry", "--spec", str(path)]
            env = {**head.environment, **(environment or {})}
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def wait_for_step(self, progress: Path, at_least: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert self.process.poll() is None, self.told()
            if progress.exists() and json.loads(progress.read_text())["step"] >= at_least:
                return
            time.sleep(0.1)
        raise AssertionError(f"no step {at_least} within {PATIENCE_S} s: {self.told()}")

    def told(self) -> str:
        """What driver and ranks wrote."""
        logs = [self.log, *sorted(self.attempt_folder.glob("rank-*.log"))]
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)

    def rank_process(self, rank: int) -> int:
        match = re.search(r"process (\d+)", (self.attempt_folder / f"rank-{rank}.log").read_text())
        assert match is not None
        return int(match[1])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_trial_on_ray_stops_when_asked_resumes_and_reports_a_killed_rank(tmp_path, packed, head):
    progress = tmp_path / "progress.json"
    first = Driver(tmp_path, 1, packed, head)
    try:
        first.wait_for_step(progress, 2)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(PATIENCE_S) == 76, first.told()
    finally:
        first.end()
    stopped = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert (stopped.state, stopped.step) == ("stopped", max(stopped.step, 2))
    logs = [(tmp_path / f"attempts/1/rank-{rank}.log").read_text() for rank in range(2)]
    assert "training step 2/" in logs[0]
    assert "rank 1 of 2" in logs[1]

    second = Driver(tmp_path, 2, packed, head)
    try:
        second.wait_for_step(progress, stopped.step + 2)
        os.kill(second.rank_process(1), signal.SIGKILL)
        assert second.process.wait(PATIENCE_S) == 1, second.told()
    finally:
        second.end()
    lost = Outcome.model_validate_json((tmp_path / "attempts/2/outcome.json").read_text())
    assert (lost.state, lost.error_class) == ("failed", "node"), lost
    assert "resume at step" in (tmp_path / "attempts/2/rank-0.log").read_text()


def test_one_rank_alone_stops_when_asked_and_its_death_is_told(tmp_path, packed, head):
    stopped = Driver(tmp_path, 1, packed, head, ranks=1)
    try:
        stopped.wait_for_step(tmp_path / "progress.json", 2)
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.process.wait(PATIENCE_S) == 76, stopped.told()
    finally:
        stopped.end()
    assert "rank 0 of 1" in (tmp_path / "attempts/1/rank-0.log").read_text()
    ended = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    killed = Driver(tmp_path, 2, packed, head, ranks=1)
    try:
        killed.wait_for_step(tmp_path / "progress.json", ended.step + 2)
        os.kill(killed.rank_process(0), signal.SIGKILL)
        assert killed.process.wait(PATIENCE_S) == 1, killed.told()
    finally:
        killed.end()
    lost = Outcome.model_validate_json((tmp_path / "attempts/2/outcome.json").read_text())
    assert (lost.state, lost.error_class) == ("failed", "node"), lost
    assert lost.error.startswith("Ray: rank 0: ")


def test_one_rank_for_which_no_node_has_room_gives_up_and_says_what_it_needs(
    tmp_path, packed, head
):
    soon = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
    driver = Driver(tmp_path, 1, packed, head, soon, ranks=1, cpus_per_rank=64)
    try:
        assert driver.process.wait(PATIENCE_S) == 1, driver.told()
    finally:
        driver.end()
    outcome = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert outcome.error_class == "node"
    assert outcome.error == "Ray: no node has had CPU 64 free for 2 s"


@pytest.mark.slow
def test_a_rank_that_hangs_ends_with_the_grace_time(tmp_path, packed, head):
    driver = Driver(tmp_path, 1, packed, head)
    try:
        driver.wait_for_step(tmp_path / "progress.json", 2)
        os.kill(driver.rank_process(1), signal.SIGSTOP)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.process.wait(PATIENCE_S) == 75, driver.told()
    finally:
        driver.end()
    outcome = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert outcome.state == "preempted"
    assert "not at its end 20 s after the request" in outcome.error


@pytest.mark.slow
def test_a_node_that_ray_drains_preempts_the_trial(tmp_path, packed):
    nodes, driver = Head(tmp_path, 1, 1), None
    try:
        driver = Driver(tmp_path, 1, packed, nodes)
        driver.wait_for_step(tmp_path / "progress.json", 2)
        nodes.drain_last()
        assert driver.process.wait(PATIENCE_S) == 75, driver.told()
    finally:
        if driver is not None:
            driver.end()
        nodes.end()
    outcome = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert (outcome.state, outcome.step) == ("preempted", max(outcome.step, 2))
    assert any((tmp_path / "checkpoints").glob(f"0001-{outcome.step:08d}/complete.json"))


def test_one_rank_has_the_device_that_ray_gave_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert world_alone(0).device == torch.device("cpu")  # the node's GPUs are other trials'
    assert world_alone(1).device == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world_alone(0).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"torch reaches none there; .*maskray doctor"):
        world_alone(0.5)


def test_what_a_rank_prints_is_a_file_on_the_remote_storage(s3_uri):
    storage = Files(s3_uri)
    with logged_to(storage, "attempts/1/rank-0.log"):
        os.write(1, b"step 1\n")  # what `print` does where pytest does not capture it
        os.write(2, b"a library's own line\n")
    assert storage.read("attempts/1/rank-0.log") == b"step 1\na library's own line\n"


def test_the_driver_tells_what_the_most_telling_rank_said(tmp_path, packed, capsys):
    spec = spec_of(tmp_path, run_of(packed), ranks=2)
    storage = Files(str(tmp_path))
    for rank, error_class, error in (
        (0, "collective", "peer lost"),
        (1, "out_of_memory", "lower the batch"),
    ):
        cause = {"rank": rank, "error_class": error_class, "error": error}
        storage.write_json(f"attempts/1/rank-{rank}.cause.json", cause)
    assert conclude(spec, storage, ["rank 0: RayActorError"]) == 78
    outcome = Outcome.model_validate_json(storage.read("attempts/1/outcome.json"))
    assert (outcome.error_class, outcome.error) == ("out_of_memory", "rank 1: lower the batch")
    assert outcome.rank == 1
    assert "lower the batch" in capsys.readouterr().err


def test_a_rank_that_nccl_s_watchdog_ended_is_named_with_what_it_wrote(tmp_path, packed):
    """The watchdog aborts its process: no handler runs, Ray only sees that the rank is gone."""
    spec = spec_of(tmp_path, run_of(packed), ranks=2)
    storage = Files(str(tmp_path))
    line = (
        "[E321 02:07:08.408 ProcessGroupNCCL.cpp:607] [Rank {}] Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
        "Timeout(ms)=600000) ran for 600013 milliseconds before timing out.\n"
    )
    for rank in range(2):
        storage.write(f"attempts/1/rank-{rank}.log", line.format(rank).encode())
    assert conclude(spec, storage, ["rank 0: the actor died", "rank 1: the actor died"]) == 1
    outcome = Outcome.model_validate_json(storage.read("attempts/1/outcome.json"))
    assert outcome.error_class == "collective"
    assert outcome.error.startswith("rank 0: NCCL's ALLREDUCE was not over after 10 minutes")


def test_a_missing_spec_is_one_line():
    with pytest.raises(ValueError, match=r"--spec /no/spec\.json: no such file"):
        read_spec("/no/spec.json")
