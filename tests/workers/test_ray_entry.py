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

from tests.workers.test_run import run_of, spec_of
from workers.config import Outcome
from workers.ray_entry import conclude, read_spec
from workers.storage import Storage


class Driver:
    """`python -m workers.ray_entry` with a Ray of its own, all of whose processes end with it."""

    def __init__(self, folder: Path, attempt: int, packed: tuple[str, str]) -> None:
        self.attempt_folder = folder / "attempts" / str(attempt)
        self.attempt_folder.mkdir(parents=True)
        spec = spec_of(folder, run_of(packed, loop__steps=1_000_000), attempt=attempt, ranks=2, cpus_per_rank=1)
        path = self.attempt_folder / "spec.json"
        path.write_text(spec.model_dump_json())
        self.temporary = tempfile.mkdtemp(prefix="mr-", dir="/tmp")  # short: Ray's sockets lie below it
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": self.temporary,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "OMP_NUM_THREADS": "1",
        }
        with (self.attempt_folder / "driver.log").open("wb") as log:
            command = [sys.executable, "-m", "workers.ray_entry", "--spec", str(path)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.log = self.attempt_folder / "driver.log"

    def wait_for_step(self, progress: Path, at_least: int) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            if progress.exists() and json.loads(progress.read_text())["step"] >= at_least:
                return
            time.sleep(0.1)
        raise AssertionError(f"no step {at_least} within 300 s: {self.log.read_text()}")

    def end(self) -> None:
        mine: list[Any] = []
        try:
            root = psutil.Process(self.process.pid)
            mine = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
        mine += [p for p in psutil.process_iter(["cmdline"]) if self.temporary in " ".join(p.info["cmdline"] or ())]
        for process in mine:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


def test_a_trial_on_ray_stops_when_asked_resumes_and_reports_a_killed_rank(tmp_path, packed):
    progress = tmp_path / "progress.json"
    first = Driver(tmp_path, 1, packed)
    try:
        first.wait_for_step(progress, 2)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(240) == 76, first.log.read_text()
    finally:
        first.end()
    stopped = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert (stopped.state, stopped.step) == ("stopped", max(stopped.step, 2))
    logs = [(tmp_path / f"attempts/1/rank-{rank}.log").read_text() for rank in range(2)]
    assert "training step 2/" in logs[0]
    assert "rank 1 of 2" in logs[1]

    second = Driver(tmp_path, 2, packed)
    try:
        second.wait_for_step(progress, stopped.step + 2)
        match = re.search(r"process (\d+)", (tmp_path / "attempts/2/rank-1.log").read_text())
        assert match is not None
        os.kill(int(match[1]), signal.SIGKILL)
        assert second.process.wait(240) == 1, second.log.read_text()
    finally:
        second.end()
    lost = Outcome.model_validate_json((tmp_path / "attempts/2/outcome.json").read_text())
    assert (lost.state, lost.error_class) == ("failed", "node"), lost
    assert "resume at step" in (tmp_path / "attempts/2/rank-0.log").read_text()


def test_the_driver_tells_what_the_most_telling_rank_said(tmp_path, packed, capsys):
    spec = spec_of(tmp_path, run_of(packed), ranks=2)
    storage = Storage(str(tmp_path))
    for rank, error_class, error in ((0, "collective", "peer lost"), (1, "out_of_memory", "lower the batch")):
        cause = {"rank": rank, "error_class": error_class, "error": error}
        storage.write_json(f"attempts/1/rank-{rank}.cause.json", cause)
    assert conclude(spec, storage, ["rank 0: RayActorError"]) == 78
    outcome = Outcome.model_validate_json(storage.read("attempts/1/outcome.json"))
    assert (outcome.error_class, outcome.error) == ("out_of_memory", "rank 1: lower the batch")
    assert "lower the batch" in capsys.readouterr().err


def test_a_missing_spec_is_one_line():
    with pytest.raises(ValueError, match=r"--spec /no/spec\.json: no such file"):
        read_spec("/no/spec.json")
