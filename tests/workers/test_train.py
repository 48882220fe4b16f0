"""`python -m workers.train` as a person uses it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.attempt import SPEC_FILE, Outcome, Progress
from contract.files import Files
from contract.model import SmoothL1
from contract.presets import run_preset
from contract.recipe import parse_run
from contract.run_file import merged
from tests.nullgpu import null_cuda
from tests.workers.ranks import run_ranks
from tests.workers.trials import run_of
from workers.tracking.console import progress_text
from workers.train import main, next_attempt, read_run, share_of_cores
from workers.training.world import World, end_with_launcher
from workers.trial.causes import exit_status
from workers.trial.stop import StopRequest, grace_enforced, late_outcome


def run_file(folder: Path, packed: tuple[str, str], **overrides: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_of(packed, **overrides).model_dump(mode="json")))
    return path


def train_command(*arguments: str, ranks: int = 1) -> list[str]:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    return [sys.executable, *torchrun, "-m", "workers.train", *arguments, "--cpus-per-rank", "1"]


def test_a_run_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\ndata: {train: a, val: b}\nmodel: {roi: {kind: pool}}\n")
    run = read_run(path, ["loop.steps=7", "model.mask.loss.kind=softmax"])
    assert (run.loop.steps, run.loop.global_batch) == (7, 8)
    assert (run.model.roi.kind, run.model.mask.loss.kind) == ("pool", "softmax")


def test_merging_replaces_a_record_of_another_kind():
    base = {"roi": {"kind": "align", "samples": 2}, "n": {"a": 1, "b": 2}}
    assert merged(base, {"roi": {"kind": "pool"}, "n": {"b": 3}}) == {
        "roi": {"kind": "pool"},
        "n": {"a": 1, "b": 3},
    }


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("preset: tinny\n", [], "run.yaml: preset: no model preset 'tinny'; did you mean 'tiny'?"),
        ("preset: tiny\ndata: {train: [a, val: b}\n", [], "run.yaml, line 2: while parsing"),
        (
            "preset: tiny\n",
            ["--set", "model.roi.kind=["],
            "--set model.roi.kind=[: the value, line 2: while parsing",
        ),
        (
            "preset: tiny\n",
            ["--set", "model.mask.loss_weight=.nan"],
            "--set model.mask.loss_weight=.nan: the value, line 1: : .nan is not a finite number",
        ),
        (
            "data: {train: a, val: b}\noptimiser: {kind: sgd, lr: .inf}\n",
            [],
            "optimiser.lr: .inf is not a finite number",
        ),
        (
            "preset: tiny\n",
            ["--set", "model.backbone.norm.groups=7"],
            "model.backbone.norm.groups: must divide the 64 channels",
        ),
        ("preset: tiny\ndata: {train: a, val: b}\nlop: {}\n", [], "did you mean 'loop'?"),
        ("preset: tiny\n", [], "data.train: is required"),
        ("preset: tiny\n", ["--set", "loop.steps"], "has no '='"),
        ("- 1\n", [], "expected fields like"),
        (
            "preset: tiny\n",
            ["--set", "loop.steps=[1"],
            "--set loop.steps=[1: the value, line 2: while parsing",
        ),
        ("preset: [a]\n", [], "run.yaml: preset: ['a'] is no name"),
        ("preset: tiny\n", ["--cpus-per-rank", "-3"], "--cpus-per-rank -3: give 1 or more"),
        ("preset: tiny\n", ["--grace-s", "0"], "--grace-s 0: give more than 0"),
        ("preset: tiny\n", ["--grace-s", "nan"], "--grace-s nan: give more than 0"),
    ],
)
def test_mistakes_in_a_run_file_are_one_line_and_status_2(
    tmp_path, capsys, text, arguments, message
):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main([str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "overrides"), [("a: [b\nc: d\n", []), ("preset: tiny\n", ["model.roi.kind=["])]
)
def test_what_is_wrong_with_the_yaml_is_told_in_one_line(tmp_path, text, overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line \d: while parsing") as refused:
        read_run(path, overrides)
    assert "\n" not in str(refused.value)


def test_a_run_file_that_is_a_folder_or_no_text_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"preset: \xff\n")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "run.yaml", "not UTF-8 text (byte 8)"),
    ):
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: {message}" in error
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
    run = parse_run(
        {**run_preset(name), "data": {**run_preset(name)["data"], "train": "a", "val": "b"}}, name
    )
    assert (
        run.loop.steps,
        run.loop.global_batch,
        run.optimiser.lr,
        run.schedule.drop_steps,
    ) == recipe
    if name == "vgg16-faster-rcnn":
        return
    # Detectron's published values: smooth L1, biases, warm-up, pixel centres
    model = run.model
    assert (model.rpn.box_loss, model.box_loss) == (SmoothL1(beta=1 / 9), SmoothL1(beta=1.0))
    assert not model.roi.aligned
    assert (run.optimiser.bias_lr_factor, run.optimiser.bias_decay_factor) == (2.0, 0.0)
    assert (run.schedule.warmup_steps, run.schedule.warmup_factor) == (500, 1 / 3)


def test_progress_is_one_line():
    progress = Progress(
        attempt=1,
        step=5,
        steps=10,
        phase="training",
        loss=1.25,
        images_per_s=9.5,
        seconds_left=65,
        updated_at=0,
    )
    assert progress_text(progress) == "training step 5/10  loss 1.2500  9.5 images/s  1:05 left"


def test_a_refused_command_leaves_a_stop_file_to_the_run_that_it_was_written_for(tmp_path, packed):
    out = tmp_path / "out"
    Files(str(out)).write("stop", b"")
    path = run_file(tmp_path, packed, model__num_classes=7)
    assert main([str(path), "--out", str(out), "--cpus-per-rank", "1"]) == 2
    assert (out / "stop").exists()
    path = run_file(tmp_path, packed)
    assert main([str(path), "--out", str(out), "--cpus-per-rank", "1"]) == 0
    assert not (out / "stop").exists()


def test_a_stop_that_is_asked_for_while_a_run_starts_is_kept(tmp_path, packed):
    out = tmp_path / "out"

    def ask() -> None:
        while not (out / SPEC_FILE.format(attempt=1)).exists():
            time.sleep(0.005)
        Files(str(out)).write("stop", b"")

    asking = threading.Thread(target=ask)
    asking.start()
    path = run_file(tmp_path, packed, loop__steps=100_000)
    assert main([str(path), "--out", str(out), "--cpus-per-rank", "1"]) == exit_status(
        Outcome(state="stopped")
    )
    asking.join()


def test_a_folder_keeps_its_trial_id_and_shares_it_with_no_other_of_its_name(tmp_path):
    folders = [Files(str(tmp_path / parent / "out")) for parent in ("a", "b")]
    (first, trial), (_, other) = map(next_attempt, folders)
    assert first == 1
    assert trial.startswith("out-")
    assert trial != other
    folders[0].write_json("checkpoints/claim.json", {"attempt": 1})
    folders[0].write_json("attempts/1/spec.json", {"trial": trial})
    assert next_attempt(folders[0]) == (2, trial)


def test_ranks_on_one_machine_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    assert share_of_cores({}) == cores
    assert share_of_cores({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "16"}) == max(cores // 2, 1)
    assert share_of_cores({"LOCAL_WORLD_SIZE": "1000"}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_rank_outlives_its_launcher():
    assert run_ranks(orphan_ends, 1) == [True]


def orphan_ends(_: World) -> bool:
    """Starts a launcher that starts a rank and is gone; returns when the rank is, too."""
    alive, held_by_rank = os.pipe()
    launcher = os.fork()
    if not launcher:
        ready, started = os.pipe()
        if not os.fork():
            end_with_launcher()
            os.write(started, b"x")
            signal.pause()
        os.read(ready, 1)
        os._exit(0)
    os.close(held_by_rank)
    os.waitpid(launcher, 0)
    return os.read(alive, 1) == b""  # the end of the file: nobody holds the other end any more


def test_an_attempt_that_does_not_end_within_its_grace_is_ended():
    left: queue.Queue[str] = queue.Queue()
    stop = StopRequest()
    with grace_enforced(stop, 0.01, left.put):
        stop.ask("preempted")
        assert left.get(timeout=60) == "preempted"
    late = late_outcome("preempted", 0.01)
    assert (late.state, exit_status(late)) == ("preempted", 75)
    assert "resumes from its last checkpoint" in late.error


def test_under_torchrun_one_json_object_is_all_of_stdout(tmp_path, packed):
    path = run_file(tmp_path, packed)
    command = train_command(str(path), "--out", str(tmp_path / "out"), "--json", ranks=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    assert (answer["state"], answer["step"]) == ("done", 4)
    assert json.loads((tmp_path / "out/result.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not())
def test_more_ranks_than_gpus_are_refused_by_name_before_nccl_is_asked(tmp_path, packed):
    """Two processes on a machine with one CUDA device: torchrun would give both the same one."""
    out = tmp_path / "out"
    command = train_command(str(run_file(tmp_path, packed)), "--out", str(out), ranks=2)
    finished = null_cuda.run(command)
    outcome = Outcome.model_validate_json((out / "attempts/1/outcome.json").read_text())
    assert (outcome.state, outcome.error_class) == ("failed", "person"), finished.stderr
    assert outcome.error.startswith("ranks 0, 1 share GPU 0000:00:00 of ")
    assert finished.stderr.count(f"error: {outcome.error}") == 1
    assert "Duplicate GPU" not in finished.stderr
