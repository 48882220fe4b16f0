"""Whole trials of the tiny preset: their files, their records in MLflow, and how they fail."""

from __future__ import annotations

import errno
import json
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from contract.attempt import MLflowTracking, NoTracking, Outcome, Result, RunSpec
from contract.files import Files
from model.accelerate import kernels
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from tests.workers.fakes import die
from tests.workers.ranks import run_ranks
from tests.workers.trials import asked_at_once, go, mlflow_run, run_of, spec_of
from workers.sync import sync
from workers.training.build import initial_detector
from workers.training.run import run_trial
from workers.training.world import World
from workers.trial.causes import exit_status
from workers.trial.stop import StopRequest, files_asking


def test_a_trial_leaves_its_files_and_tells_mlflow_everything(tmp_path, packed, store):
    run = run_of(packed, model__mask__loss__kind="softmax", loop__eval_every_steps=2)
    tracking = MLflowTracking(uri=store, experiment="whole", step_metrics_every=2)
    spec = spec_of(
        tmp_path,
        run,
        tracking=tracking,
        arm={"masks": "softmax"},
        tags={"maskray.code": "abc"},
        study_yaml="name: s\n",
    )
    outcome = go(spec)
    assert (outcome.state, outcome.step, outcome.error) == ("done", 4, "")
    result = Result.model_validate_json((tmp_path / "result.json").read_text())
    kinds = ("bbox", "segm", "segm-argmax", "segm-probability", "segm-versus_background")
    assert {f"{kind}/AP" for kind in kinds} | {
        "images_per_s",
        "data_wait_fraction",
        "train_seconds",
    } <= set(result.metrics)
    assert result.metrics["segm/AP"] == result.metrics["segm-argmax/AP"]
    assert (result.precision, result.kernels) == ("fp32", kernels(torch.device("cpu")))
    assert all((tmp_path / path).exists() for path in result.artifacts.values())
    assert set(result.artifacts) >= {
        "detections/bbox",
        "detections/segm",
        "picture/last",
        "weights/last",
        "series",
    }
    assert pq.read_table(tmp_path / "artifacts/series.parquet")["step"].to_pylist() == [1, 2, 3, 4]
    assert len(list((tmp_path / "artifacts/pictures").glob("*.png"))) == 2
    detections = json.loads((tmp_path / "artifacts/detections/segm.json").read_text())
    assert set(detections[0]) == {"image_id", "category_id", "score", "segmentation"}
    loaded = load_file(tmp_path / "artifacts/weights-last.safetensors")
    initial_detector(run).load_state_dict(loaded)

    client, tracked = mlflow_run(store, "whole")
    assert tracked.info.run_id == result.mlflow_run_id
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["model.roi.kind"] == "align"
    assert tracked.data.params["optimiser.lr"] == "0.001"
    wanted = {
        "maskray.trial": "t-1",
        "maskray.arm.masks": "softmax",
        "maskray.seed": "0",
        "maskray.code": "abc",
    }
    assert wanted.items() <= tracked.data.tags.items()
    assert len(tracked.data.tags["maskray.manifest.train"]) == 64
    for name in ("loss", "loss/mask", "lr", "grad_norm", "images_per_s", "data_wait_fraction"):
        assert [m.step for m in client.get_metric_history(tracked.info.run_id, name)] == [2, 4]
    assert {
        "bbox/AP",
        "segm/AP",
        "segm-argmax/AP",
        "system/rank-0/memory_gib",
    } <= tracked.data.metrics.keys()
    assert any(name.startswith("segm/AP/") for name in tracked.data.metrics)
    artifacts = {a.path for a in client.list_artifacts(tracked.info.run_id)}
    assert artifacts >= {
        "config.yaml",
        "study.yaml",
        "series.parquet",
        "weights-last.safetensors",
        "pictures",
        "detections",
    }


def test_each_category_has_a_metric_of_its_own_whatever_it_is_called(tmp_path, store, capsys):
    synthesise(tmp_path, num_images=6, size=64, seed=0)
    names = ["..", "a/b", "a:b", "it's (x2)"]
    folders = []
    for part in ("train", "val"):
        path = tmp_path / "annotations" / f"instances_{part}.json"
        coco = json.loads(path.read_text())
        for category, name in zip(coco["categories"], names, strict=True):
            category["name"] = name
        path.write_text(json.dumps(coco))
        folders.append(str(tmp_path / part))
        pack([path], str(tmp_path / "images" / part), folders[-1], PackOptions())
    run = run_of((folders[0], folders[1]), loop__steps=2, loop__eval_every_steps=1)
    outcome = go(
        spec_of(tmp_path / "t", run, tracking=MLflowTracking(uri=store, experiment="odd names"))
    )
    assert (outcome.state, outcome.error) == ("done", "")
    _, tracked = mlflow_run(store, "odd names")
    found = [name for name in tracked.data.metrics if name.startswith("bbox/AP/")]
    assert len(found) == len(names)
    assert {"bbox/AP/__", "bbox/AP/it_s _x2_"} <= set(found)
    assert not (tmp_path / "t/spool/rejected.jsonl").exists()
    assert capsys.readouterr().out.count("'a/b' as 'a_b-") == 1


def test_a_diverging_trial_fails_with_its_reason_in_outcome_and_mlflow(tmp_path, packed, store):
    run = run_of(packed, optimiser__lr=1e30, loop__guard__max_rollbacks=0, loop__clip_grad_norm=0.0)
    outcome = go(spec_of(tmp_path, run, tracking=MLflowTracking(uri=store, experiment="diverged")))
    assert (outcome.state, outcome.error_class, exit_status(outcome)) == ("failed", "diverged", 77)
    assert "sample ids" in outcome.error
    assert (
        Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text()) == outcome
    )
    _, tracked = mlflow_run(store, "diverged")
    assert tracked.info.status == "FAILED"
    assert tracked.data.tags["maskray.error"] == outcome.error


def test_a_stop_file_ends_the_trial_with_a_checkpoint_and_the_next_attempt_resumes(
    tmp_path, packed
):
    storage, stop = Files(str(tmp_path)), StopRequest()
    storage.write("stop", b"")
    with files_asking(stop, storage, 1, lambda: False, print):
        outcome = go(spec_of(tmp_path, run_of(packed, loop__steps=100_000)), stop)
    assert (outcome.state, exit_status(outcome)) == ("stopped", 76)
    assert 0 < outcome.step < 100_000
    storage.delete("stop")
    again = go(spec_of(tmp_path, run_of(packed, loop__steps=100_000), attempt=2), asked_at_once())
    assert again.step == outcome.step + 1
    assert again.events[0].kind == "resume"


def test_an_older_attempt_is_fenced_and_writes_no_result(tmp_path, packed, capsys):
    Files(str(tmp_path)).write_json("checkpoints/claim.json", {"attempt": 2})
    outcome = go(spec_of(tmp_path, run_of(packed)))
    assert (outcome.state, outcome.error_class) == ("failed", "node")
    assert "attempt 2 has taken over" in outcome.error
    assert "Traceback" not in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()


def test_a_run_whose_result_cannot_be_written_is_finished_for_nobody(
    tmp_path, packed, store, monkeypatch
):
    write = Files.write

    def full(self: Files, path: str, data: bytes) -> None:
        if path == "result.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, data)

    monkeypatch.setattr(Files, "write", full)
    outcome = go(
        spec_of(
            tmp_path, run_of(packed), tracking=MLflowTracking(uri=store, experiment="full disk")
        )
    )
    assert (outcome.state, "No space left" in outcome.error) == ("failed", True)
    _, tracked = mlflow_run(store, "full disk")
    assert (tracked.info.status, tracked.data.tags["maskray.state"]) == ("FAILED", "failed")


def test_a_trial_on_an_object_store_keeps_there_what_a_dead_tracker_could_not_be_told(
    tmp_path, packed, store, s3_uri, monkeypatch
):
    dead = MLflowTracking(uri="http://127.0.0.1:9", experiment="remote", step_metrics_every=2)
    outcome = go(
        RunSpec(run=run_of(packed), storage=s3_uri, trial="t-2", tracking=dead, cache=str(tmp_path))
    )
    assert (outcome.state, outcome.error) == ("done", "")
    remote = Files(s3_uri)
    assert Result.model_validate_json(remote.read("result.json")).step == 4
    target = remote.read("spool/target.json").decode().replace("http://127.0.0.1:9", store)
    remote.write("spool/target.json", target.encode())
    assert sync(s3_uri) > 0
    assert sync(s3_uri) == 0
    client, tracked = mlflow_run(store, "remote")
    assert [m.step for m in client.get_metric_history(tracked.info.run_id, "loss")] == [2, 4]
    assert tracked.info.status == "FINISHED"


def test_a_rank_that_dies_ends_the_others_with_an_outcome(tmp_path, packed):
    spec = spec_of(tmp_path, run_of(packed, loop__steps=100_000), ranks=2)
    first, second = run_ranks(die_on_rank_1, 2, spec)
    assert second is None
    assert (first.state, first.error_class) == ("failed", "collective")
    written = Outcome.model_validate_json((tmp_path / "attempts/1/outcome.json").read_text())
    assert written.error_class == "collective"


def die_on_rank_1(world: World, spec: RunSpec) -> Outcome:
    if world.rank == 1:
        import workers.training.loop

        ready = workers.training.loop.apply_gradients

        def apply_then_die(*arguments: Any) -> Any:
            ready(*arguments)
            die()

        workers.training.loop.apply_gradients = apply_then_die
    return run_trial(spec, world, StopRequest(), lambda progress: None)


def test_a_rank_that_raises_gives_the_others_its_reason(tmp_path, packed):
    spec = spec_of(tmp_path, run_of(packed, loop__steps=100_000), ranks=2)
    outcomes = run_ranks(raise_on_rank_1, 2, spec)
    assert [outcome.error for outcome in outcomes] == ["rank 1: the arm has a bug"] * 2
    assert {(outcome.error_class, outcome.rank) for outcome in outcomes} == {("unknown", 1)}


def raise_on_rank_1(world: World, spec: RunSpec) -> Outcome:
    import torch.distributed as dist

    import workers.training.loop

    if world.rank == 1:

        def broken(*arguments: Any) -> Any:
            raise RuntimeError("the arm has a bug")

        workers.training.loop.apply_gradients = broken
    outcome = run_trial(spec, world, StopRequest(), lambda progress: None)
    if world.rank == 1:
        dist.destroy_process_group()  # as the end of its process would
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return outcome


def test_no_tracking_needs_no_mlflow(tmp_path, packed):
    assert spec_of(tmp_path, run_of(packed)).tracking == NoTracking()
