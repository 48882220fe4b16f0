"""The code package of an older version under this service, and its checkpoint under this code.

Commit 89a7758 is the last one before `contract/`. It has other modules and writes complete JSON.
What passes between it and this version is a wire format: module names, a trial's files, JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.answers import TrialView
from contract.study import Submission
from orchestrator.client import Client
from orchestrator.local import connect as local
from orchestrator.study.code_package import CodePackage, package
from orchestrator.travel import expand_with_its_code
from tests.orchestrator.studies import tiny_study
from tests.orchestrator.waiting import wait_until

ROOT = Path(__file__).parents[2]
OLDER = "89a7758"
STEPS, CHECKPOINT_STEPS = 40, 5


@pytest.fixture(scope="module")
def older() -> CodePackage:
    known = subprocess.run(
        ["git", "-C", str(ROOT), "cat-file", "-e", f"{OLDER}^{{commit}}"],
        capture_output=True,
        check=False,
    )
    if known.returncode != 0:
        pytest.skip(f"this clone does not hold commit {OLDER}")
    return package(ROOT, OLDER)


@pytest.fixture
def house() -> Iterator[Path]:
    """A folder with a service, a Ray head of two cores and no MLflow."""
    root = Path(tempfile.mkdtemp(prefix="mr"))
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(root))
    patch.setenv("TMPDIR", str(root))
    patch.setattr(tempfile, "tempdir", None)
    for name in ("MASKRAY_SERVER", "MASKRAY_TOKEN"):
        patch.delenv(name, raising=False)
    (root / ".maskray").mkdir()
    settings = {"ray_cpus": 1, "ray_memory_mib": 80, "poll_s": 0.2, "mlflow": ""}
    (root / ".maskray/service.yaml").write_text(yaml.safe_dump(settings))
    try:
        yield root
    finally:
        local.shut_down(root)
        patch.undo()
        shutil.rmtree(root)


def make_data(folder: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "data", "synth", str(folder)]
    options = ["--images", "20", "--size", "64", "--pack", "--json"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def checkpoints(trial: TrialView) -> list[Path]:
    """Those that are complete."""
    return sorted(Path(trial.storage).glob("checkpoints/0*-*/complete.json"))


def test_an_older_package_runs_stops_and_goes_on_under_this_service(
    house: Path, older: CodePackage, tmp_path: Path
) -> None:
    make_data(house / "data")
    overrides = {
        "loop.steps": STEPS,
        "loop.global_batch": 1,
        "loop.checkpoint_every_steps": CHECKPOINT_STEPS,
        "data.short_sides_px": [64],
        "data.max_side_px": 64,
    }
    study = tiny_study(
        {"roi": {"align": {}}}, baseline={"preset": "tiny", "set": overrides}, metrics=["bbox/AP"]
    )
    expansion = expand_with_its_code(study, data=str(house / "data"), root=ROOT, code=older)
    with Client(local.ensure_local_service(house)) as client:
        client.upload_code(older.sha256, older.data)
        submitted = client.submit(
            Submission(
                study=study, study_yaml="name: older", trials=expansion.trials, code=older.sha256
            )
        )

        def until(what: str, condition: Any) -> TrialView:
            def look() -> TrialView | None:
                [trial] = client.study(submitted.study).trials
                return trial if condition(trial) else None

            return wait_until(what, look, house / ".maskray/service-process.log")

        until("checkpoint", lambda trial: checkpoints(trial))
        client.act_on_study(submitted.study, "pause")
        paused = until("pause", lambda trial: trial.state == "queued")
        kept = shutil.copytree(paused.storage, tmp_path / "kept")
        client.act_on_study(submitted.study, "resume")
        done = until("end", lambda trial: trial.state in ("done", "failed"))
    assert (done.state, done.attempts, done.error) == ("done", 2, "")
    assert [event.kind for event in done.events] == ["resume"]
    assert 0 < done.events[0].step < STEPS
    assert "bbox/AP" in done.metrics
    result = json.loads((Path(done.storage) / "result.json").read_text())
    assert result["step"] == STEPS

    # this version takes up the older one's checkpoint where that one stopped
    command = [sys.executable, "-m", "workers.train", str(kept / "artifacts/config.yaml")]
    resumed = subprocess.run(
        [*command, "--out", str(kept), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    again = json.loads((kept / "result.json").read_text())
    assert (again["step"], [event["kind"] for event in again["events"]]) == (STEPS, ["resume"])
    assert again["events"][0]["step"] == done.events[0].step
