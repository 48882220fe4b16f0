"""A study becomes exactly the trials that it means, or one line that says why not."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from contract.study import Study
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.expand import CONDITIONAL, Expansion, expand
from tests.orchestrator.studies import COCO_80, CODE, tiny_study, write_dataset, write_manifest

ROI = {"pool": {"model.roi.kind": "pool"}, "align": {"model.roi.kind": "align"}}
MASKS = {
    "softmax": {"model.mask.loss.kind": "softmax"},
    "sigmoid": {"model.mask.loss.kind": "sigmoid"},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


def expanded(study: Study, data: Path | str) -> Expansion:
    return expand(study, data=str(data), root=Path.cwd(), code=CODE)


def refused(study: Study, data: Path | str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what the callers check
        expanded(study, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_grid_has_every_combination_and_seed(data: Path) -> None:
    trials = expanded(tiny_study({"roi": ROI, "masks": MASKS}, seeds=[0, 5]), data).trials
    assert [trial.key for trial in trials] == [
        f"roi={roi},masks={masks}/seed-{seed}"
        for roi in ("pool", "align")
        for masks in ("softmax", "sigmoid")
        for seed in (0, 5)
    ]
    assert [trial.key for trial in trials if trial.baseline] == [
        "roi=align,masks=sigmoid/seed-0",
        "roi=align,masks=sigmoid/seed-5",
    ]
    assert [trial.run["seed"] for trial in trials[:2]] == [0, 5]
    assert len({trial.identity for trial in trials}) == 8


def test_one_at_a_time_changes_one_factor(data: Path) -> None:
    trials = expanded(tiny_study({"roi": ROI, "masks": MASKS}, design="one_at_a_time"), data).trials
    assert [trial.key for trial in trials] == [
        "roi=align,masks=sigmoid/seed-0",
        "roi=pool,masks=sigmoid/seed-0",
        "roi=align,masks=softmax/seed-0",
    ]
    assert [trial.baseline for trial in trials] == [True, False, False]


def test_the_first_level_is_the_reference_when_none_equals_the_baseline(data: Path) -> None:
    factors = {"steps": {"short": {"loop.steps": 10}, "long": {"loop.steps": 20}}}
    trials = expanded(tiny_study(factors), data).trials
    assert [(trial.arm["steps"], trial.baseline) for trial in trials] == [
        ("short", True),
        ("long", False),
    ]


def test_a_study_without_factors_is_its_baseline(data: Path) -> None:
    (trial,) = expanded(tiny_study(), data).trials
    assert (trial.key, trial.arm, trial.baseline) == ("baseline/seed-0", {}, True)


def test_a_kind_switches_its_fields(data: Path) -> None:
    factors = {
        "masks": {
            "softmax": {"model.mask.loss.kind": "softmax", "model.mask.loss.others": "own_class"}
        }
    }
    (trial,) = expanded(tiny_study(factors), data).trials
    assert trial.run["model"]["mask"]["loss"] == {
        "kind": "softmax",
        "others": "own_class",
        "inference": "argmax",
    }


def test_relative_data_starts_at_the_root(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    (trial,) = expand(tiny_study(), data="data", root=tmp_path, code=CODE).trials
    assert trial.run["data"]["train"] == str(tmp_path / "data" / "train")
    sets = {"data.train": "data/train", "data.val": "data/val"}
    (same,) = expand(
        tiny_study(baseline={"preset": "tiny", "set": sets}), root=tmp_path, code=CODE
    ).trials
    assert same.identity == trial.identity


def test_trials_carry_where_their_numbers_come_from(data: Path) -> None:
    tags = expanded(tiny_study(), data).trials[0].tags
    assert (tags["maskray.sources"], tags["maskray.val_images"]) == (CODE.source_hash, "10")
    assert len(tags["maskray.manifest_train"]) == 64


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (
            {"roi": {"a": {"model.roy.kind": "pool"}}},
            "factors.roi.a: model.roy: no such field; did you mean 'roi'?",
        ),
        (
            {"roi": {"a": {"model.roi.sampels": 2}}},
            "model.roi.sampels: no such field; did you mean 'samples'?",
        ),
        (
            {"roi": {"a": {"model.roi.kind": "aling"}}},
            "model.roi.kind: no kind 'aling'; did you mean 'align'?",
        ),
        (
            {"roi": {"a": {"model.roi.kind": "x"}}},
            "model.roi.kind: no kind 'x'; there are align, pool, warp",
        ),
        (
            {"lr": {"a": {"optimiser": {"lr": 1}}}},
            "optimiser.kind: is required, it says which fields there are",
        ),
        (
            {"roi": {"a": {"model.roi.samples": -1}}},
            "model.roi.samples: Input should be greater than or equal to 0",
        ),
        ({"roi": {"a": {"loop.steps": "many"}}}, "loop.steps: Input should be a valid integer"),
        (
            {"x": {"a": {"model.nope": 1}, "b": {"model.nope": 2}}},
            "(no level of 'x' fits the baseline)",
        ),
        ({"x": {"a": {"loop.steps.more": 1}}}, "it has no fields"),
        ({"x": {"a": {"": 1}}}, "is not a dotted path"),
        ({"x": {"a": {"seed": 1}}}, "a study's seeds stand in its 'seeds'"),
        (
            {"x": {"a": {}, "b": {"model.roi.kind": "align"}}},
            "'a' and 'b' both leave the baseline as it is",
        ),
        (
            {"x": {"a": {"loop.steps": 9}, "b": {"loop.steps": 9}}},
            "x=a and x=b come out as the same run",
        ),
        (
            {"x": {"a": {"loop.steps": 9}}, "y": {"b": {"loop.steps": 8}}},
            "set loop.steps to different values",
        ),
        (
            {"roi": ROI, "samples": {"two": {}, "four": {"model.roi.samples": 4}}},
            "arm roi=pool,samples=four: model.roi.samples: no such field",
        ),
        (
            {"x": {"a": {"loop.guard.rate_factor": 0.3}}},
            "has no effect while loop.guard.action is 'skip_window'",
        ),
    ],
)
def test_an_arm_that_cannot_be_is_refused(data: Path, factors: dict[str, Any], said: str) -> None:
    assert said in refused(tiny_study(factors), data)


TWICE: dict[str, Any] = {"copy": {"first": {}, "second": {}, "third": {"model.roi.kind": "align"}}}


def test_a_control_runs_one_arm_again_with_seeds_of_its_own(data: Path) -> None:
    trials = expanded(tiny_study(TWICE, control="same_arm", seeds=[0, 4]), data).trials
    assert [trial.key for trial in trials] == [
        "copy=first/seed-0",
        "copy=first/seed-4",
        "copy=second/seed-5",
        "copy=second/seed-9",
        "copy=third/seed-10",
        "copy=third/seed-14",
    ]
    assert len({trial.identity for trial in trials}) == 6  # none is a copy of another's result
    assert [trial.run["seed"] for trial in trials] == [trial.seed for trial in trials]
    assert [trial.arm["copy"] for trial in trials if trial.baseline] == ["first", "first"]


def test_a_control_of_different_arms_is_refused(data: Path) -> None:
    said = refused(tiny_study({"roi": ROI}, control="same_arm"), data)
    assert "the arms roi=pool and roi=align are not the same run" in said
    assert "give a factor two levels" in refused(tiny_study(control="same_arm"), data)
    looks = {"start": 3, "most": 5, "looks": [3, 5]}
    assert "give seeds as a list" in refused(
        tiny_study(TWICE, control="same_arm", seeds=looks), data
    )


def test_conditional_fields_exist(tmp_path: Path) -> None:
    run = BaselineRun.of(tiny_study(), tmp_path).run
    for path in (*CONDITIONAL, *(other for other, _ in CONDITIONAL.values())):
        attrgetter(path)(run)  # raises AttributeError where there is no such field


def test_data_must_be_there(tmp_path: Path) -> None:
    assert "no dataset; give --data DIR" in refused(tiny_study(), "")
    assert "has no manifest.json; pack the data with 'maskray data pack'" in refused(
        tiny_study(), tmp_path
    )
    write_dataset(tmp_path)
    assert "is inside a packed dataset; give --data the folder" in refused(
        tiny_study(), tmp_path / "val"
    )
    (tmp_path / "val" / "manifest.json").write_text("[]")
    assert "data.val: " in refused(tiny_study(), tmp_path)
    (tmp_path / "val" / "manifest.json").write_text('{"schema_version": ')
    assert "data.val: " in refused(tiny_study(), tmp_path)


def test_the_model_must_fit_the_data(tmp_path: Path) -> None:
    coco = write_dataset(tmp_path / "coco", COCO_80)
    assert "set model.num_classes=80" in refused(tiny_study(), coco)
    person = {"data.filter.categories": ["person"], "model.num_classes": 1}
    assert expanded(tiny_study(baseline={"preset": "tiny", "set": person}), coco).trials
    typo = {"data.filter.categories": ["persn"], "model.num_classes": 1}
    assert "did you mean 'person'?" in refused(
        tiny_study(baseline={"preset": "tiny", "set": typo}), coco
    )


def test_masks_and_keypoints_must_be_there(tmp_path: Path) -> None:
    boxes = write_dataset(tmp_path / "boxes", masks=False)
    assert "has no masks; set model.mask.kind to 'none'" in refused(tiny_study(), boxes)
    keypoints = tiny_study({"task": {"keypoints": {"model.keypoints.kind": "keypoints"}}})
    assert "has no keypoints" in refused(keypoints, write_dataset(tmp_path / "shapes"))
    five = tiny_study(
        {"task": {"five": {"model.keypoints": {"kind": "keypoints", "num_keypoints": 5}}}}
    )
    with_points = write_dataset(tmp_path / "points", keypoints=True)
    assert "model.keypoints.num_keypoints is 5" in refused(five, with_points)
    assert expanded(keypoints, with_points).trials


def test_both_splits_have_the_same_categories_and_images(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train")
    write_manifest(tmp_path / "val", ("a", "b", "c", "d"))
    assert "has other categories than data.train" in refused(tiny_study(), tmp_path)
    write_manifest(tmp_path / "val", images=0)
    assert "has no images" in refused(tiny_study(), tmp_path)


def test_more_ranks_than_images_a_step_are_refused(data: Path) -> None:
    assert "8 images a step cannot be shared by 16 ranks" in refused(
        tiny_study(resources={"ranks": 16}), data
    )


def test_too_many_trials_are_refused(data: Path) -> None:
    assert "more than 10,000 trials" in refused(tiny_study(seeds=list(range(10_001))), data)


def test_weights_of_other_recipes_are_warned_about(tmp_path: Path) -> None:
    coco = write_dataset(tmp_path, COCO_80)
    factors = {"weights": {"old": {}, "new": {"model.weights.name": "IMAGENET1K_V2"}}}
    study = tiny_study(factors, baseline={"preset": "r50-fpn"})
    warning, same = expanded(study, coco).warnings
    assert same.startswith("data.val is data.train"), "both manifests are the same here"
    assert "weights of different recipes" in warning
    assert "weights=new" in warning


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    coco = write_dataset(tmp_path, COCO_80)
    gone = {"preset": "r50-fpn", "set": {"model.weights": {"kind": "file", "path": "absent.pth"}}}
    assert "there is no such file" in refused(tiny_study(baseline=gone), coco)
    wrong = {
        "preset": "r50-fpn",
        "set": {
            "model.backbone": {"kind": "resnet", "depth": 34},
            "model.weights.name": "IMAGENET1K_V2",
        },
    }
    assert "torchvision has no IMAGENET1K_V2 weights of resnet34" in refused(
        tiny_study(baseline=wrong), coco
    )


def test_another_way_to_write_the_same_place_leaves_the_baseline_as_it_is(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    write_manifest(tmp_path / "more", images=20)
    factors = {"data": {"other": {"data.train": "more"}, "same": {"data.train": "./train"}}}
    trials = expand(tiny_study(factors), data=str(tmp_path), root=tmp_path, code=CODE)
    assert [trial.baseline for trial in trials.trials] == [False, True]


def test_arms_whose_files_have_the_same_content_are_the_same_run(
    data: Path, tmp_path: Path
) -> None:
    copy = write_manifest(tmp_path / "copy")
    said = refused(tiny_study({"data": {"here": {}, "there": {"data.train": str(copy)}}}), data)
    assert "data=here/seed-0 and data=there/seed-0 come out as the same run" in said
