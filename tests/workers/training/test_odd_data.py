"""Data that training takes: evaluation takes it too, and what is the same by name is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.attempt import Outcome, Result
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from tests.workers.trials import go, run_of, spec_of
from workers.training.build import open_datasets

Coco = dict[str, Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    synthesise(folder, num_images=10, size=64, seed=0, keypoints=True)
    return folder


def split(drawn: Path, out: Path, name: str, change: Callable[[Coco], None] = lambda coco: None):
    """Packs a split after `change` of its JSON; the folder."""
    coco = json.loads((drawn / f"annotations/instances_{name}.json").read_text())
    change(coco)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(coco))
    folder = out / name
    pack([out / f"{name}.json"], str(drawn / "images" / name), str(folder), PackOptions())
    return str(folder)


def outcome_of(folder: Path, train: str, val: str, **overrides: Any) -> Outcome:
    return go(spec_of(folder, run_of((train, val), loop__steps=2, **overrides)))


def other_ids(coco: Coco) -> None:
    """The same categories under other ids, in another order."""
    coco["categories"] = [c | {"id": 100 - c["id"]} for c in reversed(coco["categories"])]
    for annotation in coco["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]


def test_categories_match_by_name_whatever_their_ids(tmp_path, drawn):
    """The same weights score the same on the same images under other ids."""
    train = split(drawn, tmp_path, "train")
    plain = split(drawn, tmp_path, "val")
    other = split(drawn, tmp_path / "other", "val", other_ids)
    scores = []
    for name, val in (("plain", plain), ("other", other)):
        outcome = outcome_of(tmp_path / name, train, val)
        assert outcome.state == "done", outcome.error
        result = Result.model_validate_json((tmp_path / name / "result.json").read_text())
        scores.append((result.weights_sha256, result.metrics["bbox/AR100"], result.per_class))
    assert scores[0] == scores[1]
    data = open_datasets(run_of((train, other)), "")
    assert [[c.name for c in view.for_evaluation(run_of((train, other)).data).categories]
            for view in data] == [[c.name for c in data[0].categories]] * 2  # fmt: skip


def renamed(coco: Coco) -> None:
    coco["categories"][0]["name"] = "someone else"


def test_other_names_are_refused_by_training_as_by_plan(tmp_path, drawn):
    train, val = split(drawn, tmp_path, "train"), split(drawn, tmp_path, "val", renamed)
    outcome = outcome_of(tmp_path / "run", train, val)
    assert outcome.error_class == "person"
    assert "has other categories than data.train (someone else" in outcome.error


def no_masks(coco: Coco) -> None:
    """Some objects without a mask: None, an empty list, and no field."""
    for number, annotation in enumerate(coco["annotations"]):
        if number % 3 == 0:
            annotation["segmentation"] = None
        elif number % 3 == 1:
            annotation["segmentation"] = []


def five_points(coco: Coco) -> None:
    for category in coco["categories"]:
        if category.get("keypoints"):
            category["keypoints"] = category["keypoints"][:5]
            category.pop("skeleton", None)
    for annotation in coco["annotations"]:
        if annotation.get("keypoints"):
            annotation["keypoints"] = annotation["keypoints"][:15]
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])


def test_what_trains_is_evaluated(tmp_path, drawn, capsys):
    """Objects without masks, five keypoints: no training ends without its numbers."""

    def odd(coco: Coco) -> None:
        no_masks(coco)
        five_points(coco)

    train, val = (split(drawn, tmp_path, name, odd) for name in ("train", "val"))
    keypoints = {"kind": "keypoints", "num_keypoints": 5, "convs": 1, "width": 16}
    outcome = outcome_of(
        tmp_path / "run",
        *(train, val),
        model__keypoints=keypoints,
        model__num_classes=1,
        data__filter={"categories": ["person"]},
    )
    assert outcome.state == "done", outcome.error
    result = Result.model_validate_json((tmp_path / "run/result.json").read_text())
    assert {"keypoints/AP", "segm/AP", "bbox/AP"} <= set(result.metrics)
    said = capsys.readouterr().out
    assert "without mask: boxes only" in said
    pairs = "left_eye with right_eye, left_ear with right_ear"
    assert f"a flip swaps {pairs} and leaves nose in place" in said


def test_a_mended_val_goes_on_from_the_trained_weights(tmp_path, drawn, monkeypatch):
    """Evaluation fails after the last step: the weights stand, and a resume only evaluates."""
    train, val = split(drawn, tmp_path, "train"), split(drawn, tmp_path, "val")
    run = run_of((train, val), loop__steps=2)

    def refused(*_args: object, **_fields: object) -> None:
        raise ValueError("annotation 7: no scorer takes this")

    with monkeypatch.context() as patch:
        patch.setattr("workers.training.evaluate.evaluate_and_match", refused)
        outcome = go(spec_of(tmp_path / "run", run))
    assert (outcome.state, outcome.error_class) == ("failed", "person")
    weights = tmp_path / "run/artifacts/weights-last.safetensors"
    before = weights.read_bytes()
    split(drawn, tmp_path / "other", "val", other_ids)
    mended = run.model_copy(
        update={"data": run.data.model_copy(update={"val": str(tmp_path / "other/val")})}
    )
    outcome = go(spec_of(tmp_path / "run", mended, attempt=2))
    assert (outcome.state, outcome.step) == ("done", 2), outcome.error
    assert weights.read_bytes() == before


def headed(coco: Coco) -> None:
    """Roboflow's root: a category without objects that heads all others."""
    for category in coco["categories"]:
        category["supercategory"] = "project"
    root = {"id": 0, "name": "project", "supercategory": "none"}
    coco["categories"].insert(0, root)


@pytest.mark.parametrize("way", ["count it", "leave it out"])
def test_both_ways_out_of_a_category_without_objects_train(tmp_path, drawn, way):
    train, val = (split(drawn, tmp_path, name, headed) for name in ("train", "val"))
    outcome = outcome_of(tmp_path / "first", train, val)
    assert outcome.error_class == "person"
    assert "set model.num_classes=5, or choose" in outcome.error
    names = yaml.safe_load(outcome.error.partition("data.filter.categories=")[2])
    ways = {
        "count it": {"model__num_classes": 5},
        "leave it out": {"data__filter": {"categories": names}},
    }
    outcome = outcome_of(tmp_path / "second", train, val, **ways[way])
    assert outcome.state == "done", outcome.error


def test_a_run_on_crowds_alone_says_why_and_what_to_do(tmp_path, drawn):
    def crowds(coco: Coco) -> None:
        for annotation in coco["annotations"]:
            annotation["iscrowd"] = 1

    train, val = split(drawn, tmp_path, "train", crowds), split(drawn, tmp_path, "val")
    outcome = outcome_of(tmp_path / "run", train, val)
    assert (outcome.error_class, outcome.step) == ("person", 0)
    assert "crowds); iscrowd 1 marks a region to ignore" in outcome.error
