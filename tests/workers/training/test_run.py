"""Whole trials of the tiny preset: their files, their records in MLflow, and how they fail."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from contract.attempt import MLflowTracking, NoTracking, Outcome, Result, RunSpec
from contract.files import Files
from contract.metrics import result_kinds
from contract.recipe import RunConfig
from model.accelerate import kernels
from pipelines.load.proposals import write_proposals
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from pipelines.shards.dataset import open_dataset
from tests.builders import tiny_run
from tests.workers.fakes import alone, die
from tests.workers.ranks import run_ranks
from workers.rescore import rescore
from workers.sync import sync
from workers.train import next_attempt
from workers.training.build import eval_loader, initial_detector, open_datasets
from workers.training.evaluate import (
    best_metric,
    evaluate_detector,
    metric_names,
    score,
)
from workers.training.run import _open, run_trial
from workers.training.state import check_same_training
from workers.training.world import World
from workers.trial.causes import (
    cause_of,
    classify,
    exit_status,
    explain_out_of_memory,
    most_telling,
)
from workers.trial.checkpoints import CheckpointStore, FencedError
from workers.trial.stop import StopRequest, files_asking


def run_of(packed: tuple[str, str], **overrides: Any) -> RunConfig:
    base = {
        "loop.steps": 4,
        "loop.global_batch": 2,
        "loop.log_every_steps": 2,
        "data.short_sides_px": [64],
        "data.max_side_px": 64,
        "model.image.short_side_px": 64,
        "model.image.max_side_px": 64,
        "model.inference.score_threshold": 0.0,
        "model.inference.detections_per_image": 5,
    }
    return tiny_run(
        {**base, **{name.replace("__", "."): value for name, value in overrides.items()}}, *packed
    )


def spec_of(folder: Path, run: RunConfig, **fields: Any) -> RunSpec:
    return RunSpec(run=run, storage=str(folder), trial="t-1", name="roi=align/seed-0", **fields)


def go(spec: RunSpec, stop: StopRequest | None = None) -> Outcome:
    return run_trial(spec, alone(), stop or StopRequest(), lambda progress: None)


def mlflow_run(uri: str, experiment: str) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__num_classes": 80},
            r"model.num_classes is 80, .* has 4 categories .* set model.num_classes=4",
        ),
        (
            {"data__train": "/nowhere/at/all"},
            r"/nowhere/at/all: no manifest.json there; pack the data",
        ),
        ({"data__filter__categories": ["unicorn"]}, "unicorn"),
        (
            {"loop__best_metric": "segm/APP"},
            "loop.best_metric: this model has no metric 'segm/APP'; .* 'segm/AP'",
        ),
        ({"loop__best_metric": "keypoints/AP"}, "this model has no metric 'keypoints/AP'"),
        (
            {"model__weights__kind": "file", "model__weights__path": "/no/w.pt"},
            "path /no/w.pt: there is no such file",
        ),
    ],
)
def test_what_a_person_got_wrong_is_one_line_and_status_2(
    tmp_path, packed, overrides, message, capsys
):
    outcome = go(spec_of(tmp_path, run_of(packed, **overrides)))
    assert (outcome.state, outcome.error_class, exit_status(outcome)) == ("failed", "person", 2)
    assert re.search(message, outcome.error), outcome.error
    assert capsys.readouterr().out == f"rank 0 ends: {outcome.error}\n"
    assert (
        "Traceback"
        in json.loads((tmp_path / "attempts/1/rank-0.cause.json").read_text())["details"]
    )
    assert "\n" not in outcome.error


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "segm/AP"),
        ({"model__mask__kind": "none"}, "bbox/AP"),
        ({"loop__best_metric": "bbox/AP75"}, "bbox/AP75"),
    ],
)
def test_the_best_weights_are_chosen_by_a_metric_that_the_model_has(packed, overrides, expected):
    assert best_metric(run_of(packed, **overrides)) == expected


def test_the_metrics_that_a_model_has_are_those_that_its_evaluation_finds(packed):
    run = run_of(packed, model__mask__loss__kind="softmax")
    _, data = open_datasets(run, "")
    nothing: dict[str, Any] = {kind: [] for kind in result_kinds(run.model)}
    for boundary in (False, True):
        names = metric_names(run.model, boundary)
        assert sorted(score(data, nothing, boundary).metrics) == sorted(names)
        assert ("boundary/APs" in names) == boundary


def test_data_of_another_schema_is_one_line_and_status_2(tmp_path, packed):
    text = (Path(packed[0]) / "manifest.json").read_text()
    version = json.loads(text)["schema_version"]
    (tmp_path / "manifest.json").write_text(
        json.dumps({**json.loads(text), "schema_version": version + 1})
    )
    outcome = go(spec_of(tmp_path / "out", run_of(packed, data__train=str(tmp_path))))
    assert exit_status(outcome) == 2, outcome
    assert f"schema {version + 1}, this version reads {version}" in outcome.error


def test_a_shard_that_is_gone_is_named(tmp_path, packed):
    data = shutil.copytree(packed[0], tmp_path / "data")
    for shard in data.glob("shard*"):
        shard.unlink()
    outcome = go(spec_of(tmp_path / "out", run_of(packed, data__train=str(data))))
    assert outcome.state == "failed"
    assert re.search(
        r"shard.*(no such file|not there|gone|missing)", outcome.error, re.IGNORECASE
    ), outcome.error
    assert "\n" not in outcome.error


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


def test_a_run_that_shares_a_training_evaluates_it_alone_and_is_scored_anew(
    tmp_path, packed, capsys
):
    first, second = tmp_path / "first", tmp_path / "second"
    assert go(spec_of(first, run_of(packed))).state == "done"
    other = run_of(packed, model__inference__detections_per_image=2, loop__best_metric="bbox/AP")
    outcome = go(spec_of(second, other, trained=str(first)))
    assert (outcome.state, outcome.step) == ("done", 4)
    assert [event.kind for event in outcome.events] == ["trained"]
    made, shared = (
        Result.model_validate_json((folder / "result.json").read_text())
        for folder in (first, second)
    )
    assert shared.weights_sha256 == made.weights_sha256
    assert shared.metrics["train_seconds"] == made.metrics["train_seconds"]  # no step was taken
    fewer = json.loads((second / shared.artifacts["detections/bbox"]).read_text())
    assert 0 < len(fewer) < len(json.loads((first / made.artifacts["detections/bbox"]).read_text()))
    assert (second / shared.artifacts["series"]).exists()
    # The second run took no step, so it has no checkpoint to take steps from; it says so.
    capsys.readouterr()
    alone_again = go(spec_of(tmp_path / "third", other, trained=str(second)))
    assert (alone_again.state, alone_again.events) == ("done", [])
    assert f"{second}: has no checkpoint of step 4; this run trains" in capsys.readouterr().out
    scores = rescore(Files(str(second))).metrics
    assert scores == {name: shared.metrics[name] for name in scores}
    assert "segm/AP" in scores


def asked_at_once() -> StopRequest:
    stop = StopRequest()
    stop.ask("preempted")
    return stop


def test_an_older_attempt_is_fenced_and_writes_no_result(tmp_path, packed, capsys):
    Files(str(tmp_path)).write_json("checkpoints/claim.json", {"attempt": 2})
    outcome = go(spec_of(tmp_path, run_of(packed)))
    assert (outcome.state, outcome.error_class) == ("failed", "node")
    assert "attempt 2 has taken over" in outcome.error
    assert "Traceback" not in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimiser__lr": 0.5}, "the checkpoint was written with optimiser.lr"),
        ({"data__train": "/nowhere/at/all"}, "/nowhere/at/all: no manifest.json"),
    ],
)
def test_a_refused_attempt_leaves_the_folder_to_the_one_that_trains_in_it(
    tmp_path, packed, overrides, message
):
    assert (
        go(spec_of(tmp_path, run_of(packed, loop__steps=100_000)), asked_at_once()).state
        == "preempted"
    )
    before = files_below(tmp_path)
    refused = go(spec_of(tmp_path, run_of(packed, loop__steps=100_000, **overrides), attempt=2))
    assert (refused.error_class, message in refused.error) == ("person", True), refused.error
    after = files_below(tmp_path)
    assert {
        name: data for name, data in after.items() if not name.startswith("attempts/2/")
    } == before
    assert next_attempt(Files(str(tmp_path)))[0] == 3


@pytest.mark.parametrize("missing", ["train", "val"])
def test_proposals_that_lack_an_image_are_refused_before_the_folder_is_taken(
    tmp_path, packed, missing
):
    images = {
        name: open_dataset(uri).image_ids().tolist()
        for name, uri in zip(("train", "val"), packed, strict=True)
    }
    gone = min(images[missing])
    boxes, scores = np.array([[0, 0, 8, 8]], np.float32), np.ones(1, np.float32)
    uri = str(tmp_path / "proposals.arrow")
    write_proposals(uri, [(i, boxes, scores) for i in {*images["train"], *images["val"]} - {gone}])
    out = tmp_path / "out"
    refused = go(
        spec_of(out, run_of(packed, model__proposals__kind="fixed", model__proposals__uri=uri))
    )
    pattern = rf"{uri}: no proposals for 1 of \d+ images, the first is {gone}; .*maskray proposals"
    assert (refused.error_class, bool(re.search(pattern, refused.error))) == ("person", True), (
        refused.error
    )
    assert not (out / "checkpoints").exists()


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


def test_other_training_data_at_the_same_path_is_not_resumed_on(tmp_path, packed):
    """Validation data may change: `test_odd_data` mends them."""
    place = tmp_path / "data"
    shutil.copytree(packed[0], place)
    run = run_of(packed, loop__steps=100_000, data__train=str(place))
    assert go(spec_of(tmp_path / "out", run), asked_at_once()).state == "preempted"
    shutil.rmtree(place)
    shutil.copytree(packed[1], place)
    refused = go(spec_of(tmp_path / "out", run, attempt=2))
    hashes = "manifest [0-9a-f]{12} then, [0-9a-f]{12} now"
    pattern = rf"data\.train: {place} is other data .*{hashes}.*new folder"
    assert (refused.error_class, bool(re.search(pattern, refused.error))) == ("person", True), (
        refused.error
    )


def test_a_checkpoint_without_hashes_of_its_data_is_resumed_from(packed):
    run = run_of(packed)
    check_same_training({"run": run.model_dump(mode="json")}, run, {"train": "a", "val": "b"})


def test_what_one_rank_finds_wrong_is_refused_by_all_before_the_folder_is_taken(tmp_path, packed):
    outcomes = run_ranks(no_data_on_rank_1, 2, spec_of(tmp_path, run_of(packed), ranks=2))
    assert [(outcome.error_class, outcome.error) for outcome in outcomes] == [
        ("person", "no data on this node")
    ] * 2
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "spool").exists()


def no_data_on_rank_1(world: World, spec: RunSpec) -> Outcome:
    import workers.training.run

    def missing(run: RunConfig, cache: str) -> Any:
        raise ValueError("no data on this node")

    if world.rank == 1:
        workers.training.run.open_datasets = missing
    return run_trial(spec, world, StopRequest(), lambda progress: None)


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


@pytest.mark.parametrize(("rank", "warnings"), [(0, 1), (1, 0)])
def test_a_precision_that_the_cpu_imitates_is_told_once(
    tmp_path, packed, monkeypatch, capsys, rank, warnings
):
    monkeypatch.setattr("workers.training.arithmetic._cpu_computes_in", lambda precision: False)
    spec = spec_of(tmp_path, run_of(packed, loop__precision="bf16", loop__global_batch=2))
    with pytest.raises(ValueError, match="for 3 ranks"):  # what is looked at next
        _open(
            spec,
            World(rank, 3, torch.device("cpu")),
            CheckpointStore(Files(str(tmp_path)), 1, 2, print),
        )
    printed = capsys.readouterr().out
    assert printed.count("warning: loop.precision: this CPU imitates bf16") == warnings


def test_the_score_of_three_ranks_is_that_of_one_to_the_bit(packed):
    run = run_of(packed, loop__eval_batch=1)
    alone_scores = scores(alone(), run)
    assert run_ranks(scores, 3, run)[0] == alone_scores
    assert alone_scores[1]["bbox"]


def scores(world: World, run: RunConfig) -> tuple[Any, ...]:
    _, data = open_datasets(run, "")
    scored = evaluate_detector(
        run.model, initial_detector(run), eval_loader(run, data, world), world
    )
    assert scored is not None
    ordered = {kind: sorted(results, key=str) for kind, results in scored.results.items()}
    return scored.metrics, ordered, scored.per_class


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


def test_a_folder_that_one_rank_cannot_see_is_refused(tmp_path, packed):
    outcomes = run_ranks(blind_rank_1, 2, tmp_path, run_of(packed))
    assert {outcome.error_class for outcome in outcomes} == {"person"}
    assert "is not shared" in outcomes[0].error


def blind_rank_1(world: World, folder: Path, run: RunConfig) -> Outcome:
    mine = folder / f"disk-of-node-{world.rank}"
    return run_trial(spec_of(mine, run, ranks=2), world, StopRequest(), lambda progress: None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), "person"),
        (FencedError("x"), "node"),
        (OSError(5, "Input/output error"), "node"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "collective"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "unknown"),
        (KeyError("x"), "unknown"),
        (explain_out_of_memory([(8, 3, 800, 1344)], torch.device("cpu")), "out_of_memory"),
    ],
)
def test_errors_fall_into_classes_that_the_orchestrator_decides_by(error, expected):
    assert classify(error) == expected


def test_the_cause_of_a_rank_explains_better_than_its_peers_loss():
    lost = cause_of(RuntimeError("Connection closed by peer"), 0)
    own = cause_of(torch.OutOfMemoryError("CUDA out of memory"), 3)
    assert most_telling([lost, own]) == own


def test_no_tracking_needs_no_mlflow(tmp_path, packed):
    assert spec_of(tmp_path, run_of(packed)).tracking == NoTracking()
