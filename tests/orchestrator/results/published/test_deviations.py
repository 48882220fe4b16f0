"""The record of a run earns the paper's column, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from contract.recipe import RunConfig, apply_overrides, parse_run
from orchestrator.results.published.beside import Trained, earned
from orchestrator.results.published.deviations import deviations
from orchestrator.study.paper import BASELINE_ROW, paper_tables, published_difference, rows_of
from orchestrator.study.paper_runs import _RUNS, published_run
from tests.orchestrator.studies import tiny_study


def ours(table: str = "2c", row: str = "RoIAlign-ave", **changes: Any) -> RunConfig:
    """The published run with `changes` (a dotted path each)."""
    run = published_run(table, row)
    assert run is not None
    overrides = {path.replace("__", "."): value for path, value in changes.items()}
    return parse_run(apply_overrides(run.model_dump(mode="json"), overrides), "test")


def of(run: RunConfig) -> list[tuple[str, bool]]:
    return [(one.field, one.fatal) for one in deviations(run, ours())]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"loop__steps": 80_000}, "loop.steps"),
        ({"optimiser__lr": 0.002}, "optimiser.lr"),
        ({"optimiser__kind": "adamw"}, "optimiser"),
        ({"schedule__drop_steps": [100_000]}, "schedule.drop_steps"),
        ({"data__filter__categories": ["person"]}, "data.filter.categories"),
        ({"data__short_sides_px": [640, 800]}, "data.short_sides_px"),
        ({"model__backbone__depth": 101}, "model.backbone.depth"),
        ({"model__roi__reduce": "max"}, "model.roi.reduce"),
        ({"model__roi": {"kind": "pool"}}, "model.roi"),
        ({"model__rpn__nms_iou": 0.6}, "model.rpn.nms_iou"),
        ({"model__mask__loss_weight": 2.0}, "model.mask.loss_weight"),
        ({"model__image__max_side_px": 1000}, "model.image.max_side_px"),
        ({"model__inference__nms_iou": 0.5}, "model.inference.nms_iou"),
        ({"model__rpn__post_nms_test": 1000}, "model.rpn.post_nms_test"),
        ({"loop__ema_decay": 0.9}, "loop.ema_decay"),
    ],
)
def test_what_changes_the_question_is_fatal(changes: dict[str, Any], field: str) -> None:
    assert of(ours(**changes)) == [(field, True)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model__weights": {"kind": "torchvision"}}, "model.weights"),
        ({"model__backbone__stride_in_1x1": False}, "model.backbone.stride_in_1x1"),
        ({"schedule__warmup_steps": 7}, "schedule.warmup_steps"),
        ({"model__proposals": {"kind": "end_to_end"}}, "model.proposals"),
        ({"loop__precision": "bf16"}, "loop.precision"),
    ],
)
def test_what_moves_all_arms_alike_is_noted(changes: dict[str, Any], field: str) -> None:
    assert of(ours(**changes)) == [(field, False)]


def test_two_ways_to_write_one_rate_are_one_and_machinery_is_free() -> None:
    same: dict[str, Any] = {
        "optimiser__lr": 0.01,
        "optimiser__lr_batch": 8,
        "seed": 3,
        "data__train": "coco",
    }
    assert not of(ours(**same, loop__eval_every_steps=5000, data__num_loader_workers=9))


def test_a_deviation_says_both_values() -> None:
    (one,) = deviations(ours(model__weights={"kind": "torchvision"}), ours())
    paper = "the paper's is file MSRA's ImageNet weights"
    assert one.text == f"model.weights is torchvision IMAGENET1K_V1, {paper}"


def trial(run: RunConfig | None, **fields: str) -> Trained:
    images = {"train_images": "118287", "val_images": "5000"} | fields
    return Trained("roi=x/seed-0", run, **images)


def test_the_data_and_the_split_count_too() -> None:
    row = "RoIAlign-ave"
    assert earned("2c", [(trial(ours()), row)]).barred == ()
    small = earned("2c", [(trial(ours(), train_images="39"), row)])
    said = "roi=x/seed-0: the training set has 39 images, the paper's has 118,287"
    assert small.barred == (said,)
    unread = earned("2c", [(trial(None, unread="its record: no field 'x'"), row)])
    assert unread.barred == ("roi=x/seed-0: its record: no field 'x'",)
    test_dev = earned("3", [(trial(ours("3", "Mask R-CNN, R101-FPN")), "Mask R-CNN, R101-FPN")])
    assert test_dev.barred == ("table 3 is on test-dev, whose annotations are not public",)
    unknown = earned("9", [(trial(ours()), "data distillation")])
    assert unknown.barred == ("no preset describes the run of table 9, data distillation",)


def test_every_described_row_is_published_and_has_a_run() -> None:
    for table, runs in _RUNS.items():
        assert set(runs) - {BASELINE_ROW} <= set(paper_tables()[table].rows)
        assert all(published_run(table, row) for row in runs)


def test_a_published_difference_is_looked_up() -> None:
    factors = {"roi": {"a": {}, "b": {"model.roi.kind": "pool"}}}
    rows = {"roi=a": "RoIAlign-ave", "roi=b": "RoIPool"}
    study = tiny_study(factors, paper_table="2c", paper_rows=rows)
    papers = rows_of(study, [{"roi": "a"}, {"roi": "b"}])
    weights = {"roi=a": 1.0, "roi=b": -1.0}
    assert published_difference(weights, "segm/AP", papers) == pytest.approx(0.303 - 0.269)
    assert str(published_difference(weights, "bbox/AP", papers)) == "nan"
    assert str(published_difference({"roi=a": 1.0, "x": -1.0}, "segm/AP", papers)) == "nan"
    assert str(published_difference({}, "segm/AP", papers)) == "nan"
