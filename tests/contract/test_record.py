"""What two versions of maskray tell each other: fields at their default are not written."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import Field

from contract.attempt import Outcome, RunSpec
from contract.metrics import all_kinds, all_metric_names, check_metric, metric_names, stats_of
from contract.model import MaskLoss, ModelConfig
from contract.presets import PRESETS
from contract.recipe import SGD, AdamW, RunConfig
from contract.record import Message, Record
from tests.builders import tiny_run


class Older(Record):
    name: str
    sizes: tuple[int, ...] = (1, 2)


class Newer(Older):
    depth: int = Field(3, ge=1)


def test_a_new_field_at_its_default_reaches_an_older_version() -> None:
    assert Newer(name="a").sparse() == {"name": "a"}
    assert Older.model_validate(Newer(name="a", sizes=(3,)).sparse()) == Older(name="a", sizes=(3,))
    assert Newer.model_validate(Older(name="a").sparse()).depth == 3
    with pytest.raises(ValueError, match="depth"):
        Older.model_validate(Newer(name="a", depth=4).sparse())


def test_a_message_of_a_newer_version_is_read() -> None:
    class Report(Message):
        step: int = 0

    assert Report.model_validate({"step": 4, "colour": "red"}).step == 4
    assert Outcome(state="done").sparse() == {"state": "done"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_its_sparse_form(name: str) -> None:
    model = PRESETS[name]
    assert ModelConfig.model_validate(model.sparse()) == model


def test_a_record_of_a_union_keeps_its_kind() -> None:
    run = tiny_run({"model.roi.kind": "pool"})
    spec = RunSpec(run=run, storage="s")
    assert spec.sparse()["run"]["model"]["roi"] == {"kind": "pool"}
    assert RunSpec.model_validate(spec.sparse()) == spec
    base = RunConfig(data=run.data)
    assert base.model_copy(update={"optimiser": AdamW()}).sparse()["optimiser"] == {"kind": "adamw"}
    assert "optimiser" not in base.model_copy(update={"optimiser": SGD()}).sparse()


def test_metrics_are_those_that_evaluation_computes() -> None:
    assert metric_names(PRESETS["r50-fpn-keypoint"])[-1] == "keypoints/ARl"
    assert {name for model in PRESETS.values() for name in metric_names(model)} <= set(
        all_metric_names()
    )
    for loss in get_args(get_args(MaskLoss)[0]):
        assert {f"segm-{name}" for name in loss.inferences} <= set(all_kinds())
    assert "AR" in stats_of("keypoints")
    check_metric("keypoints/AR")  # was refused
    with pytest.raises(ValueError, match=r"no metric 'bbox/AR20'; did you mean 'bbox/AR10"):
        check_metric("bbox/AR20")  # was accepted, and is never computed
