"""`python -m workers.train` as a person uses it, and the thirty kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workers.test_run import run_of
from workers.config import Progress, parse_run, run_preset
from workers.console import progress_text
from workers.storage import Storage
from workers.train import main, merged, next_attempt, read_run


def run_file(folder: Path, packed: tuple[str, str], **overrides: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_of(packed, **overrides).model_dump(mode="json")))
    return path


def train_command(*arguments: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "workers.train", *arguments, "--cpus-per-rank", "1"]


def test_a_run_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\ndata: {train: a, val: b}\nmodel: {roi: {kind: pool}}\n")
    run = parse_run(read_run(path, ["loop.steps=7", "model.mask.loss.kind=softmax"]), str(path))
    assert (run.loop.steps, run.loop.global_batch) == (7, 8)
    assert (run.model.roi.kind, run.model.mask.loss.kind) == ("pool", "softmax")


def test_merging_replaces_a_record_of_another_kind():
    base = {"roi": {"kind": "align", "samples": 2}, "n": {"a": 1, "b": 2}}
    assert merged(base, {"roi": {"kind": "pool"}, "n": {"b": 3}}) == {"roi": {"kind": "pool"}, "n": {"a": 1, "b": 3}}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("preset: tinny\n", [], "no model preset 'tinny'"),
        ("preset: tiny\ndata: {train: a, val: b}\nlop: {}\n", [], "did you mean 'loop'?"),
        ("preset: tiny\n", [], "data.train: is required"),
        ("preset: tiny\n", ["--set", "loop.steps"], "has no '='"),
        ("- 1\n", [], "a run is a mapping"),
    ],
)
def test_mistakes_in_a_run_file_are_one_line_and_status_2(tmp_path, capsys, text, arguments, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main([str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("r50-fpn", (160_000, 16, 0.02, (120_000,))),
        ("r101-c4", (160_000, 16, 0.02, (120_000,))),
        ("r50-c5", (160_000, 16, 0.02, (120_000,))),
        ("x101-64x4d-fpn", (160_000, 8, 0.01, (120_000,))),
        ("r50-fpn-keypoint", (90_000, 16, 0.02, (60_000, 80_000))),
        ("vgg16-faster-rcnn", (320_000, 8, 0.003, (240_000,))),
    ],
)
def test_presets_have_the_papers_recipe(name, recipe):
    run = parse_run({**run_preset(name), "data": {**run_preset(name)["data"], "train": "a", "val": "b"}}, name)
    assert (run.loop.steps, run.loop.global_batch, run.optimiser.lr, run.schedule.drop_steps) == recipe


def test_progress_is_one_line():
    progress = Progress(
        attempt=1, step=5, steps=10, phase="training", loss=1.25, images_per_s=9.5, seconds_left=65, updated_at=0
    )
    assert progress_text(progress) == "training step 5/10  loss 1.2500  9.5 images/s  1:05 left"


def test_under_torchrun_one_json_object_is_all_of_stdout(tmp_path, packed):
    path = run_file(tmp_path, packed)
    command = train_command(str(path), "--out", str(tmp_path / "out"), "--json", ranks=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["state"], found["step"]) == ("done", 4)
    assert json.loads((tmp_path / "out/result.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_bit(tmp_path, packed):
    """SIGKILL after a random time, on one rank alone, until thirty have hit; then to the end."""
    chance = random.Random(0)
    path = run_file(tmp_path, packed, loop__steps=1200, loop__checkpoint_every_steps=5, loop__keep_checkpoints=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    kills = 0
    while kills < 30:
        before = next_attempt(Storage(str(killed)))
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                train_command(str(path), "--out", str(killed)), env=environment, stdout=log, stderr=log
            )
        while process.poll() is None and next_attempt(Storage(str(killed))) == before:
            time.sleep(0.05)  # until it has claimed the folder
        time.sleep(chance.uniform(0, 2))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    for folder in (killed, tmp_path / "whole"):
        subprocess.run(train_command(str(path), "--out", str(folder)), env=environment, check=True, capture_output=True)
    digests = {
        json.loads((folder / "result.json").read_text())["weights_sha256"] for folder in (killed, tmp_path / "whole")
    }
    print(f"{kills} kills")
    assert len(digests) == 1
    assert kills == 30
