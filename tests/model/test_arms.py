"""Every arm builds, trains a step and predicts; senseless combinations are refused."""

from __future__ import annotations

import math
from functools import reduce
from operator import getitem
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from contract.metrics import result_kinds
from contract.model import (
    FPN,
    FCNMask,
    FrozenBatchNorm,
    GroupNorm,
    KeypointBranch,
    Layout,
    MaskBranch,
    MaskHead,
    MaskLoss,
    ModelConfig,
    Norm,
    ResNet,
    ResNeXt,
    RoIOp,
)
from contract.presets import PRESETS, preset
from model.build import assemble, build_backbone, build_detector
from tests.model.arms import arms, records
from tests.model.batches import shape_batch
from tests.model.test_detector import total
from workers.training.results import coco_results

GN = {"kind": "gn", "groups": 8}
LITTLE: dict[str, Any] = {
    "num_classes": 3,
    "weights": {"kind": "none"},
    "rpn": {
        "batch_per_image": 16,
        "pre_nms_train": 50,
        "pre_nms_test": 20,
        "post_nms_train": 20,
        "post_nms_test": 8,
    },
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
    "c5": {
        "backbone": RESNET,
        "layout": {"kind": "c5", "channels": 32},
        "anchors": ONE_LEVEL,
        "mask": SMALL_FCN,
    },
    "fpn": {"backbone": RESNET, "layout": {"kind": "fpn", "channels": 32}, "mask": SMALL_FCN},
}
HEAD = {"kind": "fc", "width": 32}
NAN, INF = float("nan"), float("inf")
BOUNDED = (
    "num_classes",
    "image.short_side_px",
    "image.canvas_multiple_px",
    "layout.channels",
    "rpn.batch_per_image",
    "rpn.pre_nms_train",
    "rpn.post_nms_test",
    "sampling.rois_per_image",
    "roi.samples",
    "box_head.layers",
    "box_head.width",
    "inference.detections_per_image",
    "mask.head.convs",
    "mask.head.width",
    "keypoints.num_keypoints",
    "keypoints.convs",
    "keypoints.width",
)
GROUPED = {"norm": GroupNorm(groups=64), "frozen_stages": 0}
RESIDUAL = [
    *(
        ResNet(depth=depth, **GROUPED)
        for depth in get_args(ResNet.model_fields["depth"].annotation)
    ),
    *(
        ResNeXt(variant=variant, **GROUPED)
        for variant in get_args(ResNeXt.model_fields["variant"].annotation)
    ),
]


def config(layout: str, **changes: Any) -> ModelConfig:
    data = {**LITTLE, **LAYOUTS[layout], **changes}
    if layout != "c4":
        data["box_head"] = changes.get("box_head", HEAD)
    return ModelConfig.model_validate(data)


def train_and_predict(cfg: ModelConfig, side: int = 64) -> None:
    detector = build_detector(cfg)
    batch = shape_batch(
        images=1, objects=2, side=side, num_classes=cfg.num_classes, num_keypoints=2
    )
    total(detector.losses(batch)).backward()
    trained = [(name, p.grad) for name, p in detector.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for _, grad in trained)
    assert [name for name, grad in trained if grad is not None and grad.any()]
    detections = detector.predict(batch)
    assert detections.valid.any()
    assert all(
        values.isfinite().all()
        for values in (detections.boxes_xyxy, detections.keypoints, *detections.masks.values())
    )


def mask_branch(layout: str, **changes: Any) -> dict[str, Any]:
    return {**LAYOUTS[layout]["mask"], **changes}


def small(head: Any, layout: str) -> Any:
    """The mask head, narrow, with the convolutions that the layout allows."""
    convs = {"convs": LAYOUTS[layout]["mask"]["head"]["convs"]} if isinstance(head, FCNMask) else {}
    return head.model_copy(update={"width": 16, **convs})


def test_the_layouts_here_are_all_but_vggs():
    assert {*LAYOUTS, "conv5"} == {record.kind for record in records(Layout)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("roi", arms(RoIOp))
def test_every_layout_with_every_roi_operation(layout, roi):
    train_and_predict(config(layout, roi=roi))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", arms(MaskLoss))
def test_every_layout_with_every_mask_loss(layout, loss):
    train_and_predict(config(layout, mask=mask_branch(layout, loss=loss)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", arms(MaskHead))
def test_every_layout_with_every_mask_head(layout, head):
    train_and_predict(config(layout, mask=mask_branch(layout, head=small(head, layout))))


@pytest.mark.parametrize("head", arms(MaskHead))
@pytest.mark.parametrize("loss", arms(MaskLoss))
def test_every_mask_loss_is_scored_by_its_inferences(head, loss):
    """The configured inference is `segm`; each inference with a name has a kind of its own too."""
    cfg = config("fpn", mask=mask_branch("fpn", head=small(head, "fpn"), loss=loss))
    assert isinstance(cfg.mask, MaskBranch)
    detections = build_detector(cfg).predict(shape_batch(images=1, side=64, num_classes=3))
    results = coco_results(cfg, detections, [1, 2, 3])
    assert set(results) == set(result_kinds(cfg))
    assert set(results) == {"bbox", "segm", *(f"segm-{name}" for name in loss.inferences)}
    assert all(len(found) == int(detections.valid.sum()) for found in results.values())


@pytest.mark.parametrize(
    "backbone",
    [
        *(pytest.param(b, marks=pytest.mark.slow if "101" in str(b) else ()) for b in RESIDUAL),
        ResNet(depth=50, norm=GroupNorm(groups=8), frozen_stages=0, stride_in_1x1=True),
        *(
            ResNet(depth=18, norm=norm, frozen_stages=0)
            for norm in records(Norm)
            if not isinstance(norm, FrozenBatchNorm)  # it needs pretrained weights
        ),
    ],
    ids=str,
)
def test_every_kind_of_backbone(backbone):
    train_and_predict(config("fpn", backbone=backbone))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_boxes_alone_and_keypoints_with_and_without_masks(layout, with_mask):
    keypoints = {"kind": "keypoints", "num_keypoints": 2, "convs": 1, "width": 16}
    mask = LAYOUTS[layout]["mask"] if with_mask else {"kind": "none"}
    train_and_predict(config(layout, mask=mask, keypoints=keypoints, class_agnostic_boxes=True))
    if not with_mask:
        train_and_predict(
            config(
                layout, mask=mask, box_loss={"kind": "smooth_l1", "beta": 0.1}, background="first"
            )
        )


def test_an_mlp_of_masks_reads_seven_cells_or_fourteen():
    head = {"kind": "mlp", "width": 16}
    for side in (7, 14):
        cfg = config("fpn", mask={"kind": "mask", "head": {**head, "input_side": side}})
        detector = build_detector(cfg)
        assert detector.mask.head.fc[0].in_features == cfg.layout.channels * side * side
        train_and_predict(cfg)
    keypoints = {"kind": "keypoints", "num_keypoints": 2, "convs": 1, "width": 16}
    mask = {"kind": "mask", "head": {**head, "input_side": 7}}
    with pytest.raises(ValidationError, match="masks and keypoints read one crop"):
        config("fpn", mask=mask, keypoints=keypoints)


def test_a_box_weight_of_zero_trains_the_rpn_alone():
    cfg = config("fpn", mask={"kind": "none"}, box_loss_weight=0)
    detector = build_detector(cfg).train()
    total(detector.losses(shape_batch(images=1, side=64, num_classes=3))).backward()
    assert not any(p.grad.any() for p in detector.box.parameters())
    assert all(p.grad.any() for p in detector.rpn.parameters())
    fixed = {"kind": "fixed", "uri": "p"}
    with pytest.raises(ValidationError, match="trains the RPN alone, and"):
        config("fpn", mask={"kind": "none"}, box_loss_weight=0, proposals=fixed)


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
    cfg = {
        **LITTLE,
        "backbone": VGG,
        "layout": {"kind": "conv5"},
        "anchors": ONE_LEVEL,
        "box_head": HEAD,
    }
    train_and_predict(ModelConfig.model_validate({**cfg, "mask": SMALL_FCN}))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_as_its_name_says(name):
    cfg = preset(name)
    with torch.device("meta"):
        detector = assemble(cfg)
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
        (
            {"weights": {"kind": "none"}, "backbone": {**RESNET, "frozen_stages": 1}},
            "frozen_stages = 1 needs",
        ),
        ({"backbone": RESNET}, "belong to batch-norm, backbone.norm.kind is 'gn'"),
        (
            {"roi": {"kind": "align", "reduce": "max", "samples": 0}},
            "works with reduce 'mean' only",
        ),
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


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("anchors.ratios", [], "at least 1 item"),
        *(
            ("anchors.ratios", [ratio], "greater than or equal to 0.001")
            for ratio in (0, -1, 1e-50)
        ),
        *(("anchors.ratios", [ratio], "finite number") for ratio in (NAN, INF)),
        ("anchors.ratios", [1e9], "less than or equal to 1000"),
        ("anchors.sizes_px", [[]] * 5, "at least 1 item"),
        *(("anchors.sizes_px", [[size]] * 5, "greater than or equal to 1") for size in (0, -16)),
        ("anchors.sizes_px", [[32]] * 9, "at most 8 items"),
        (
            "anchors",
            {"sizes_px": [[1]] * 5, "rounded": True},
            "anchor of 1 px in sizes_px has no area",
        ),
        ("image.std", [0, 1, 1], "greater than or equal to 0.001"),
        ("image.std", [1, 1, -1], "greater than or equal to 0.001"),
        ("image.mean", [NAN, 1, 1], "finite number"),
        ("rpn.min_side_px", INF, "finite number"),
        ("box_loss", {"kind": "smooth_l1", "beta": 1e-40}, "greater than or equal to 0.000001"),
        ("mask.loss_weight", NAN, "finite number"),
        (
            "image",
            {"short_side_px": 800, "max_side_px": 512},
            "max_side_px = 512 is below short_side_px = 800",
        ),
        (
            "sampling.rois_per_image",
            1,
            "rois_per_image = 1 with positive_fraction = 0.25 leaves room for no positive",
        ),
        (
            "sampling.positive_fraction",
            0.001,
            "rois_per_image = 512 with positive_fraction = 0.001",
        ),
        ("rpn.batch_per_image", 1, "batch_per_image = 1 with positive_fraction = 0.5 leaves room"),
        ("rpn.positive_iou", 0.2, "positive_iou = 0.2 is below negative_iou = 0.3"),
        *((path, 10**9, "less than or equal to") for path in BOUNDED),
        *(
            ("backbone.norm", {"kind": "gn", "groups": groups}, "must divide the 64 channels")
            for groups in (3, 7, 128, 1000)
        ),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_the_name_of_its_field(path, value, reason):
    data = ModelConfig(keypoints=KeypointBranch()).model_dump()
    *parents, leaf = path.split(".")
    reduce(getitem, parents, data)[leaf] = value
    with pytest.raises(ValidationError, match=reason) as refused:
        ModelConfig.model_validate(data)
    location = [str(part) for part in refused.value.errors()[0]["loc"]]
    assert location[0] == path.split(".")[0]
    assert leaf in (*location, *reason.split())


@pytest.mark.parametrize("backbone", RESIDUAL, ids=str)
def test_group_norms_check_knows_the_narrowest_width(backbone):
    """The config checks `GroupNorm.groups` against 64: the widths are multiples of the stem's."""
    with torch.device("meta"):
        network, _ = build_backbone(backbone, 4)
    widths = {
        norm.num_channels for norm in network.modules() if isinstance(norm, torch.nn.GroupNorm)
    }
    assert math.gcd(*widths) == min(widths) == 64


@pytest.mark.parametrize(
    ("name", "hint"), [("r50-fnp", "did you mean 'r50-fpn'"), ("x", "there are r101-c4,")]
)
def test_an_unknown_preset_names_the_nearest_or_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=hint):
        preset(name)
