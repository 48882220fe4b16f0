"""Every arm builds, trains a step and predicts; combinations without sense are refused with the reason."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model.build import build_detector
from model.config import FPN, ModelConfig, preset
from model.presets import PRESETS
from tests.model.batches import shape_batch
from tests.model.test_detector import total

GN = {"kind": "gn", "groups": 8}
LITTLE: dict[str, Any] = {
    "num_classes": 3,
    "weights": {"kind": "none"},
    "rpn": {"batch_per_image": 16, "pre_nms_train": 50, "pre_nms_test": 20, "post_nms_train": 20, "post_nms_test": 8},
    "sampling": {"rois_per_image": 8},
    "inference": {"detections_per_image": 3, "score_threshold": 0.0},
}
RESNET = {"kind": "resnet", "depth": 18, "norm": GN, "frozen_stages": 0}
VGG = {"kind": "vgg16", "frozen_stages": 0}
ONE_LEVEL = {"sizes_px": [[32, 64]]}
SMALL_FCN = {"kind": "mask", "head": {"kind": "fcn", "convs": 1, "width": 16}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "c4": {
        "backbone": RESNET,
        "layout": {"kind": "c4"},
        "anchors": ONE_LEVEL,
        "box_head": {"kind": "res5"},
        "mask": {"kind": "mask", "head": {"kind": "fcn", "convs": 0, "width": 16}},
    },
    "c5": {"backbone": RESNET, "layout": {"kind": "c5", "channels": 32}, "anchors": ONE_LEVEL, "mask": SMALL_FCN},
    "fpn": {"backbone": RESNET, "layout": {"kind": "fpn", "channels": 32}, "mask": SMALL_FCN},
}
HEAD = {"kind": "fc", "width": 32}
ROIS = [{"kind": "align"}, {"kind": "align", "reduce": "max"}, {"kind": "pool"}, {"kind": "warp"}]
MASKS: list[dict[str, Any]] = [
    {"loss": {"kind": "sigmoid", "class_agnostic": True}},
    {"loss": {"kind": "softmax", "others": "background", "inference": "probability"}},
    {"loss": {"kind": "softmax", "others": "own_class", "inference": "versus_background"}},
    {"head": {"kind": "mlp", "layers": 2, "width": 16}},
    {"head": {"kind": "mlp", "layers": 3, "width": 16}, "loss": {"kind": "softmax"}},
]
BACKBONES: list[dict[str, Any]] = [
    {"kind": "resnet", "depth": 50, "norm": GN, "frozen_stages": 0, "stride_in_1x1": True},
    {"kind": "resnet", "depth": 34, "norm": {"kind": "bn"}, "frozen_stages": 0},
    {"kind": "resnext", "variant": "50-32x4d", "norm": GN, "frozen_stages": 0},
]
LARGE: list[dict[str, Any]] = [
    {"kind": "resnet", "depth": 101, "norm": GN, "frozen_stages": 0},
    {"kind": "resnext", "variant": "101-32x8d", "norm": GN, "frozen_stages": 0},
    {"kind": "resnext", "variant": "101-64x4d", "norm": GN, "frozen_stages": 0},
]


def config(layout: str, **changes: Any) -> ModelConfig:
    data = {**LITTLE, **LAYOUTS[layout], **changes}
    if layout != "c4":
        data["box_head"] = changes.get("box_head", HEAD)
    return ModelConfig.model_validate(data)


def train_and_predict(cfg: ModelConfig, side: int = 64) -> None:
    detector = build_detector(cfg)
    batch = shape_batch(images=1, objects=2, side=side, num_classes=cfg.num_classes, num_keypoints=2)
    total(detector.losses(batch)).backward()
    trained = [(name, p.grad) for name, p in detector.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for _, grad in trained)
    assert [name for name, grad in trained if grad is not None and grad.any()]
    found = detector.predict(batch)
    assert found.valid.any()
    assert all(values.isfinite().all() for values in (found.boxes_xyxy, found.keypoints, *found.masks.values()))


@pytest.mark.parametrize(
    ("layout", "roi"), list(product(LAYOUTS, ROIS)), ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_every_layout_with_every_roi_operation(layout, roi):
    train_and_predict(config(layout, roi=roi))


@pytest.mark.parametrize(
    ("layout", "mask"), list(product(LAYOUTS, MASKS)), ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_every_layout_with_every_mask_branch(layout, mask):
    train_and_predict(config(layout, mask={**LAYOUTS[layout]["mask"], **mask}))


@pytest.mark.parametrize("backbone", [*BACKBONES, *(pytest.param(b, marks=pytest.mark.slow) for b in LARGE)], ids=str)
def test_every_kind_of_backbone(backbone):
    train_and_predict(config("fpn", backbone=backbone))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_boxes_alone_and_keypoints_with_and_without_masks(layout, with_mask):
    keypoints = {"kind": "keypoints", "num_keypoints": 2, "convs": 1, "width": 16}
    mask = LAYOUTS[layout]["mask"] if with_mask else {"kind": "none"}
    train_and_predict(config(layout, mask=mask, keypoints=keypoints, class_agnostic_boxes=True))
    if not with_mask:
        train_and_predict(config(layout, mask=mask, box_loss={"kind": "smooth_l1", "beta": 0.1}, background="first"))


def test_vgg_with_its_fc_layers():
    cfg = ModelConfig.model_validate(
        {
            **LITTLE,
            "backbone": VGG,
            "layout": {"kind": "conv5"},
            "anchors": ONE_LEVEL,
            "box_head": {"kind": "vgg"},
            "roi": {"kind": "pool"},
            "mask": {"kind": "none"},
        }
    )
    train_and_predict(cfg)


def test_vgg_with_small_fc_layers_and_masks():
    cfg = {**LITTLE, "backbone": VGG, "layout": {"kind": "conv5"}, "anchors": ONE_LEVEL, "box_head": HEAD}
    train_and_predict(ModelConfig.model_validate({**cfg, "mask": SMALL_FCN}))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_as_its_name_says(name):
    cfg = preset(name)
    with torch.device("meta"):
        from model.build import _assemble

        detector = _assemble(cfg)
    assert (detector.mask is not None) == (cfg.mask.kind == "mask")
    assert (detector.keypoints is not None) == ("keypoint" in name)
    frozen = {n.split(".")[1] for n, p in detector.named_parameters() if not p.requires_grad}
    if name.startswith(("r", "x")):
        assert frozen == {"conv1", "layer1"}
        assert next(iter(detector.backbone.parameters())).shape[0] == 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": {"kind": "none"}}, "frozen batch-norm needs pretrained weights"),
        ({"weights": {"kind": "none"}, "backbone": {**RESNET, "frozen_stages": 1}}, "frozen_stages = 1 needs"),
        ({"backbone": RESNET}, "belong to batch-norm, backbone.norm.kind is 'gn'"),
        ({"roi": {"kind": "align", "reduce": "max", "samples": 0}}, "works with reduce 'mean' only"),
        ({"layout": {"kind": "c4"}}, "one RPN level"),
        ({"layout": {"kind": "c4"}, "anchors": ONE_LEVEL}, "'res5' is C4's"),
        ({"box_head": {"kind": "res5"}}, "'res5' is C4's"),
        ({"backbone": {"kind": "vgg16"}}, "one stride-16 map"),
        ({"layout": {"kind": "conv5"}, "anchors": ONE_LEVEL}, "only it has"),
        ({"box_head": {"kind": "vgg"}}, "fc6 and fc7 of backbone 'vgg16'"),
        (
            {"layout": {"kind": "c4"}, "anchors": ONE_LEVEL, "box_head": {"kind": "res5"}},
            "the mask head has 0",
        ),
        ({"anchors": {"sizes_px": [[32], [64], [128], [256], [512, 600]]}}, "equally many sizes"),
        ({"anchors": {"sizes_px": [[32], [64]]}}, "fewer than the 4 maps"),
        ({"backbone": {"kind": "resnet", "depth": 18, "stride_in_1x1": True}}, "has none"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_combinations_without_sense_are_refused_with_the_reason(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        ModelConfig.model_validate({"num_classes": 3, **changes})


def test_a_pyramid_is_made_of_neighbours():
    with pytest.raises(ValidationError, match="must double"):
        FPN(strides=(4, 16))
    with pytest.raises(ValidationError, match="must be among strides"):
        FPN(strides=(8, 16), roi_strides=(4,))


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="r50-fpn"):
        preset("r50-fnp")
