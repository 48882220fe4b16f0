"""A trial is known by what its numbers depend on: by all of that, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torchvision import models

from contract.model import FileWeights, ModelConfig
from contract.presets import PRESETS, run_preset
from contract.recipe import EVALUATION_FIELDS, RunConfig, apply_overrides, parse_run
from orchestrator.study.identity import (
    TORCHVISION_CHECKPOINTS,
    backbone_name,
    canonical,
    identity,
    proposals_identity,
    training_identity,
    weights_identity,
)
from orchestrator.study.meaning.reach import Reached

PARTS: dict[str, Any] = {
    "manifests": ("a" * 64, "b" * 64),
    "weights": "none",
    "proposals": "end_to_end",
    "code": Reached("c" * 64),
    "ranks": 2,
}


def tiny(**overrides: Any) -> RunConfig:
    paths = {
        "data.train": "t",
        "data.val": "v",
        **{key.replace("__", "."): v for key, v in overrides.items()},
    }
    return parse_run(apply_overrides(run_preset("tiny"), paths), "tests")


def test_a_record_has_one_identity() -> None:
    assert identity(tiny(), **PARTS) == identity(tiny(), **PARTS)


def test_where_the_data_lies_does_not_count() -> None:
    assert identity(tiny(data__train="s3://bucket/t"), **PARTS) == identity(tiny(), **PARTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"manifests": ("a" * 64, "d" * 64)},
        {"manifests": ("b" * 64, "a" * 64)},
        {"weights": "resnet18-f37072fd.pth"},
        {"proposals": "e" * 64},
        {"code": Reached("f" * 64)},
    ],
)
def test_each_part_counts(changed: dict[str, Any]) -> None:
    assert identity(tiny(), **(PARTS | changed)) != identity(tiny(), **PARTS)


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"model__roi__kind": "pool"}, {"optimiser__lr": 0.002}]
)
def test_each_choice_counts(changed: dict[str, Any]) -> None:
    assert identity(tiny(**changed), **PARTS) != identity(tiny(), **PARTS)


def test_ranks_count_under_trained_batch_norm_alone() -> None:
    more = PARTS | {"ranks": 4}
    assert identity(tiny(), **more) == identity(tiny(), **PARTS)
    per_rank = tiny(model__backbone__norm__kind="bn")
    assert identity(per_rank, **more) != identity(per_rank, **PARTS)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"model__inference__nms_iou": 0.6}, True),
        ({"model__inference__score_threshold": 0.1}, True),
        ({"loop__eval_every_steps": 50}, True),
        ({"data__val": "elsewhere"}, True),
        ({"model__rpn__nms_iou": 0.6}, False),
        ({"data__filter__min_area_px": 4.0}, False),
        ({"seed": 1}, False),
    ],
)
def test_what_evaluation_alone_reads_shares_a_training(changed: dict[str, Any], same: bool) -> None:
    parts = {name: value for name, value in PARTS.items() if name != "manifests"}
    before, after = (
        training_identity(run, manifest="a" * 64, **parts) for run in (tiny(), tiny(**changed))
    )
    assert (before == after) is same


def test_the_inference_of_softmax_masks_shares_a_training() -> None:
    parts = {name: value for name, value in PARTS.items() if name != "manifests"}
    runs = (
        tiny(model__mask__loss={"kind": "softmax", "inference": inference})
        for inference in ("argmax", "probability")
    )
    assert len({training_identity(run, manifest="a" * 64, **parts) for run in runs}) == 1


def test_every_field_of_evaluation_exists() -> None:
    softmax = tiny(model__mask__loss__kind="softmax").model_dump()
    for path in EVALUATION_FIELDS:
        node: Any = softmax
        for name in path.split("."):
            node = node[name]


def test_the_hash_is_of_a_known_text() -> None:
    assert canonical({"b": 1.0, "a": [True, None, "é"]}) == '{"a":[true,null,"\\u00e9"],"b":1.0}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


def test_file_weights_count_by_their_bytes(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    first.write_bytes(b"weights")
    copy.write_bytes(b"weights")
    other.write_bytes(b"Weights")

    def name(path: Path) -> str:
        return weights_identity(ModelConfig(weights=FileWeights(path=str(path))))

    assert name(first) == name(copy) != name(other)


def test_fixed_proposals_count_by_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "proposals.arrow"
    path.write_bytes(b"boxes")
    run = tiny(model__proposals={"kind": "fixed", "uri": str(path)})
    before = proposals_identity(run.model)
    assert (
        proposals_identity(tiny(model__proposals={"kind": "fixed", "uri": path.as_uri()}).model)
        == before
    )
    path.write_bytes(b"Boxes")
    assert proposals_identity(run.model) != before
    path.unlink()
    with pytest.raises(ValueError, match="write it with 'maskray proposals'"):
        proposals_identity(run.model)


def test_published_checkpoints_are_torchvisions() -> None:
    for (backbone, name), (file, _) in TORCHVISION_CHECKPOINTS.items():
        assert models.get_model_weights(backbone)[name].url.endswith(f"/{file}")


def test_every_preset_knows_its_backbone() -> None:
    known = {backbone for backbone, _ in TORCHVISION_CHECKPOINTS}
    assert {backbone_name(model) for model in PRESETS.values()} <= known
