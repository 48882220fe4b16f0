"""About how large a run's checkpoints are, counted from its config without building the model."""

from __future__ import annotations

from typing import assert_never

from contract.model import (
    C4,
    FPN,
    VGG16,
    FCHead,
    FCNMask,
    KeypointBranch,
    MaskBranch,
    ModelConfig,
    ResNet,
    ResNeXt,
    VGGHead,
)
from contract.recipe import AdamW, RunConfig

# Parameters of torchvision's classification networks without the classifier, in millions.
_RESNET_M = {18: 11.2, 34: 21.3, 50: 23.5, 101: 42.5}
_RESNEXT_M = {"50-32x4d": 23.0, "101-32x8d": 86.7, "101-64x4d": 81.4}
_VGG16_M = 14.7
# Of these, the last stage, which a pyramid that ends before stride 32 leaves out.
_RESNET_RES5_M = {18: 8.4, 34: 13.1, 50: 15.0, 101: 15.0}
_RESNEXT_RES5_M = {"50-32x4d": 14.5, "101-32x8d": 28.7, "101-64x4d": 26.9}
_RES5_CHANNELS = 2048


def checkpoint_bytes(run: RunConfig) -> float:
    """The bytes of one finished trial: its kept checkpoints, its best and its last weights."""
    # In fp32: autocast lowers the precision of operations, not of weights.
    weights = 4 * parameters(run.model)
    # The momentum of SGD, the two moments of AdamW: each is as large as the weights.
    states = 2 if isinstance(run.optimiser, AdamW) else 1
    average = 1 if run.loop.ema_decay else 0
    return weights * ((1 + states + average) * run.loop.keep_checkpoints + 2)


def parameters(model: ModelConfig) -> float:
    """Trained and frozen parameters, within a few percent."""
    return (
        _backbone(model)
        + _neck_and_rpn(model)
        + _box_head(model)
        + _mask(model)
        + _keypoints(model)
    )


def _backbone(model: ModelConfig) -> float:
    cut = isinstance(model.layout, FPN) and 32 not in model.layout.strides
    match model.backbone:
        case ResNet(depth=depth):
            return 1e6 * (_RESNET_M[depth] - cut * _RESNET_RES5_M[depth])
        case ResNeXt(variant=variant):
            return 1e6 * (_RESNEXT_M[variant] - cut * _RESNEXT_RES5_M[variant])
        case VGG16():
            return 1e6 * _VGG16_M
        case _:
            assert_never(model.backbone)


def _feature_channels(model: ModelConfig) -> int:
    """Channels of the maps that RPN and RoI heads read."""
    if isinstance(model.backbone, VGG16):
        return 512
    return 1024 if isinstance(model.layout, C4) else _neck_channels(model)


def _neck_channels(model: ModelConfig) -> int:
    return int(getattr(model.layout, "channels", 512))


def _neck_and_rpn(model: ModelConfig) -> float:
    channels = _feature_channels(model)
    anchors = len(model.anchors.sizes_px[0]) * len(model.anchors.ratios)
    rpn = 9 * channels**2 + channels * anchors * 5
    stride_4 = (
        64 if isinstance(model.backbone, ResNet) and model.backbone.depth < 50 else 256
    )  # channels of res2
    match model.layout:
        case FPN(strides=strides):
            inputs = sum(stride_4 * stride // 4 for stride in strides)
            return inputs * channels + len(strides) * 9 * channels**2 + rpn
        case C4():
            return rpn
        case _:
            return rpn if isinstance(model.backbone, VGG16) else _RES5_CHANNELS * channels + rpn


def _box_head(model: ModelConfig) -> float:
    boxes = 4 if model.class_agnostic_boxes else 4 * model.num_classes
    match model.box_head:
        case FCHead(layers=layers, width=width):
            trunk = 49 * _feature_channels(model) * width + (layers - 1) * width**2
        case VGGHead():
            trunk, width = 49 * 512 * 4096 + 4096**2, 4096
        case _:
            trunk, width = 0, _RES5_CHANNELS
    return trunk + width * (model.num_classes + 1 + boxes)


def _mask(model: ModelConfig) -> float:
    if not isinstance(model.mask, MaskBranch):
        return 0.0
    outputs = model.mask.loss.num_channels(model.num_classes)
    channels = _RES5_CHANNELS if isinstance(model.layout, C4) else _feature_channels(model)
    head = model.mask.head
    if isinstance(head, FCNMask):
        convolutions = (
            9 * channels * head.width + (head.convs - 1) * 9 * head.width**2 if head.convs else 0
        )
        return (
            convolutions
            + 4 * (head.width if head.convs else channels) * head.width
            + head.width * outputs
        )
    return (
        14 * 14 * channels * head.width
        + (head.layers - 1) * head.width**2
        + head.width * outputs * 28 * 28
    )


def _keypoints(model: ModelConfig) -> float:
    branch = model.keypoints
    if not isinstance(branch, KeypointBranch):
        return 0.0
    first = 9 * _feature_channels(model) * branch.width
    return (
        first + (branch.convs - 1) * 9 * branch.width**2 + 16 * branch.width * branch.num_keypoints
    )
