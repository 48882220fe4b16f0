"""Generated odd datasets through two steps of training and evaluation, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from contract.attempt import Outcome
from contract.fit import categories_of
from contract.recipe import RunConfig
from pipelines.pack.pack import PackOptions, pack
from pipelines.shards.dataset import Dataset, open_dataset
from tests.pipelines.odd_coco import fuzzed, odd_coco, write_case, write_images
from tests.workers.fakes import alone
from tests.workers.trials import go, run_of, spec_of
from workers.training.build import train_loader_opener

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder / "images")
    return folder


def fitting_run(folder: str, dataset: Dataset) -> RunConfig:
    """A run on the dataset, without the heads that it has no data for."""
    header = dataset.manifest.header
    points = [len(c.keypoints or ()) for c in categories_of(header) if c.keypoints]
    heads: dict[str, Any] = {} if header.has_masks else {"model__mask__kind": "none"}
    if header.has_keypoints:
        heads["model__keypoints"] = {
            "kind": "keypoints", "num_keypoints": points[0], "convs": 1, "width": 16,
        }  # fmt: skip
    return run_of(
        (folder, folder),
        loop__steps=2,
        model__num_classes=len(header.categories),
        data__num_loader_workers=0,
        data__flip_pairs=[],
        **heads,
    )


def objects_of_an_epoch(run: RunConfig, dataset: Dataset) -> int:
    """How many objects the loader gives, each image once."""
    loader = train_loader_opener(run, dataset, alone())(0)
    counts: dict[int, int] = {}
    for _, step in zip(range(loader.steps_per_epoch), loader, strict=False):
        for batch in step.batches:
            for image, valid in zip(batch.sample_ids.tolist(), batch.valid, strict=True):
                counts[image] = int(valid.sum())
    loader.close()
    return sum(counts.values())


def check_told(outcome: Outcome) -> None:
    """Refused before the first step, in one line, as a person's affair."""
    assert (outcome.state, outcome.error_class, outcome.step) == ("failed", "person", 0), outcome
    assert outcome.error
    assert "\n" not in outcome.error


@given(coco=odd_coco(one_in=30, fewest=4))
@fuzzed(few=5, share=0.05)
def test_every_object_reaches_the_loss_or_is_counted(place: Path, coco: dict[str, Any]) -> None:
    path = write_case(place / "case", coco)
    folder = str(place / "case/packed")
    try:
        packed = pack([path], str(place / "images"), folder, PackOptions("skip"))
    except ValueError:
        return
    dataset = open_dataset(folder)
    run = fitting_run(folder, dataset)
    outcome = go(spec_of(place / "case/run", run))
    if outcome.state != "done":
        check_told(outcome)
        return
    trained = dataset.for_training(run.data.filter)
    census = trained.index.census(trained.selection)
    assert census.objects == packed.manifest.num_annotations
    out = census.crowds + census.without_box + census.too_small + census.beside_keypoints
    assert census.objects == census.training + out
    assert objects_of_an_epoch(run, dataset) == census.training
    json.loads((place / "case/run/result.json").read_text())
