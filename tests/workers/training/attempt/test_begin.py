"""How an attempt begins: what is refused before the folder is taken, and what is taken up."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract.attempt import Outcome, Result, RunSpec
from contract.files import Files
from contract.recipe import RunConfig
from pipelines.load.proposals import write_proposals
from pipelines.shards.dataset import open_dataset
from tests.workers.ranks import run_ranks
from tests.workers.trials import asked_at_once, go, run_of, spec_of
from workers.rescore import rescore
from workers.train import next_attempt
from workers.training.attempt.begin import open_inputs
from workers.training.run import run_trial
from workers.training.state import check_same_training
from workers.training.world import World
from workers.trial.causes import exit_status
from workers.trial.checkpoints import CheckpointStore
from workers.trial.stop import StopRequest


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
    import workers.training.attempt.begin

    def missing(run: RunConfig, cache: str) -> Any:
        raise ValueError("no data on this node")

    if world.rank == 1:
        workers.training.attempt.begin.open_datasets = missing
    return run_trial(spec, world, StopRequest(), lambda progress: None)


@pytest.mark.parametrize(("rank", "warnings"), [(0, 1), (1, 0)])
def test_a_precision_that_the_cpu_imitates_is_told_once(
    tmp_path, packed, monkeypatch, capsys, rank, warnings
):
    monkeypatch.setattr("workers.training.arithmetic._cpu_computes_in", lambda precision: False)
    spec = spec_of(tmp_path, run_of(packed, loop__precision="bf16", loop__global_batch=2))
    with pytest.raises(ValueError, match="for 3 ranks"):  # what is looked at next
        open_inputs(
            spec,
            World(rank, 3, torch.device("cpu")),
            CheckpointStore(Files(str(tmp_path)), 1, 2, print),
        )
    printed = capsys.readouterr().out
    assert printed.count("warning: loop.precision: this CPU imitates bf16") == warnings


def test_a_folder_that_one_rank_cannot_see_is_refused(tmp_path, packed):
    outcomes = run_ranks(blind_rank_1, 2, tmp_path, run_of(packed))
    assert {outcome.error_class for outcome in outcomes} == {"person"}
    assert "is not shared" in outcomes[0].error


def blind_rank_1(world: World, folder: Path, run: RunConfig) -> Outcome:
    mine = folder / f"disk-of-node-{world.rank}"
    return run_trial(spec_of(mine, run, ranks=2), world, StopRequest(), lambda progress: None)
