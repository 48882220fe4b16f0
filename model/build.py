"""From a config to a detector: the only code that reads `contract.model`. No I/O: pretrained weights come later."""

from __future__ import annotations

from functools import partial
from typing import assert_never, cast

import torch
from torch import nn

from contract import model as config
from model.backbone.layouts import LastMap, Pyramid, ReducedLastMap
from model.backbone.networks import (
    RESNETS,
    ResNetMaps,
    VGGMaps,
    feature_channels,
    fold_norms,
    keep_resolution,
    move_strides_to_1x1,
    resnet,
)
from model.branches.box import BoxBranch, FCTrunk, MeanTrunk
from model.branches.keypoint import KeypointBranch
from model.branches.mask import FCNHead, MaskBranch, MLPHead, SigmoidMasks, SoftmaxMasks
from model.cpu.convolution import take_fast_convolutions
from model.cpu.group_norm import take_fast_norms
from model.detector import Detector, Settings
from model.initial import initialise
from model.pixels import Normalise
from model.roi.crops import SeparateCrops, SharedCrops
from model.roi.operations import RoIOperation, align_operation, pool_operation, warp_operation
from model.rpn.network import RPN

BOX_SIDE, MASK_SIDE = 7, 14  # of RoI features
RESNEXTS = {
    "50-32x4d": (50, 32, 4),
    "101-32x8d": (101, 32, 8),
    "101-64x4d": (101, 64, 4),
}  # depth, groups, width
MAP_STRIDES = (4, 8, 16, 32)  # of res2 to res5
VGG_CHANNELS = 512


def build_detector(cfg: config.ModelConfig, seed: int = 0) -> Detector:
    """The detector with its initial parameters, each drawn from (seed, its name)."""
    with torch.random.fork_rng(
        devices=[]
    ):  # torch's own initialisation draws from the global generator
        detector = _assemble(cfg)
    for head in (detector.mask, detector.keypoints):
        if head is not None:  # it sees boxes that are chosen already
            take_fast_convolutions(head, in_evaluation=True)
    take_fast_convolutions(detector)
    take_fast_norms(detector)
    initialise(detector, seed)
    return detector


def _assemble(cfg: config.ModelConfig) -> Detector:
    backbone, channels = build_backbone(cfg.backbone, _num_stages(cfg.layout))
    layout, width, rpn_strides, roi_strides = build_layout(
        cfg.layout, channels, len(cfg.anchors.sizes_px)
    )
    roi = partial(build_roi_op, cfg.roi, strides=roi_strides)
    rpn = build_rpn(cfg, width, rpn_strides)
    crops: SeparateCrops | SharedCrops
    if isinstance(cfg.layout, config.C4):
        res5 = build_res5(cfg.backbone, halves=cfg.layout.roi_side == 2 * BOX_SIDE)
        crops, width, side = SharedCrops(roi(cfg.layout.roi_side), res5), channels[-1], BOX_SIDE
    else:
        crops, side = SeparateCrops(roi(BOX_SIDE), roi(MASK_SIDE)), MASK_SIDE
    return Detector(
        Normalise(cfg.image.mean, cfg.image.std, cfg.image.channels == "bgr"),
        backbone,
        layout,
        rpn,
        crops,
        build_box_branch(cfg, width),
        build_mask_branch(cfg.mask, cfg.num_classes, width, side),
        build_keypoint_branch(cfg.keypoints, width, side),
        _settings(cfg),
    )


def _num_stages(cfg: config.Layout) -> int:
    """How many of res2 to res5 the layout reads."""
    match cfg:
        case config.C4():
            return 3
        case config.C5() | config.Conv5():
            return 4
        case config.FPN():
            return MAP_STRIDES.index(cfg.strides[-1]) + 1
        case _:
            assert_never(cfg)


def build_backbone(cfg: config.Backbone, stages: int) -> tuple[nn.Module, list[int]]:
    """The image network up to that stage, and the channels of res2 to res5 (of VGG: of its one map)."""
    match cfg:
        case config.ResNet() | config.ResNeXt():
            network = _residual(cfg)
            return ResNetMaps(network, stages, cfg.frozen_stages), feature_channels(network)
        case config.VGG16():
            return VGGMaps(cfg.frozen_stages), [VGG_CHANNELS]
        case _:
            assert_never(cfg)


def build_res5(cfg: config.Backbone, halves: bool) -> nn.Module:
    """The last residual stage as the RoI head of C4: `halves` with its own stride of 2, else at stride 1."""
    assert not isinstance(cfg, config.VGG16)
    res5 = cast(nn.Module, _residual(cfg).layer4)
    if not halves:
        keep_resolution(res5)
    return res5


def _residual(cfg: config.ResNet | config.ResNeXt) -> nn.Module:
    match cfg:
        case config.ResNet():
            network = _normed(*RESNETS[cfg.depth], 1, 64, cfg.norm)
            if cfg.stride_in_1x1:
                move_strides_to_1x1(network)
            return network
        case config.ResNeXt():
            depth, groups, width = RESNEXTS[cfg.variant]
            return _normed(*RESNETS[depth], groups, width, cfg.norm)
        case _:
            assert_never(cfg)


def _normed(
    block: type[nn.Module], layers: tuple[int, ...], groups: int, width: int, norm: config.Norm
) -> nn.Module:
    match norm:
        case config.FrozenBatchNorm():
            network = resnet(block, layers, groups, width, None)
            fold_norms(network, norm.eps)
            return network
        case config.GroupNorm():
            return resnet(block, layers, groups, width, partial(nn.GroupNorm, norm.groups))
        case config.BatchNorm():
            return resnet(block, layers, groups, width, None)
        case _:
            assert_never(norm)


def build_layout(
    cfg: config.Layout, channels: list[int], rpn_levels: int
) -> tuple[nn.Module, int, tuple[int, ...], tuple[int, ...]]:
    """The layout, the channels of its maps, and the strides of its RPN and RoI maps."""
    match cfg:
        case config.C4():
            return LastMap(), channels[2], (16,), (16,)
        case config.C5():
            return ReducedLastMap(channels[3], cfg.channels), cfg.channels, (32,), (32,)
        case config.Conv5():
            return LastMap(), channels[-1], (16,), (16,)
        case config.FPN():
            levels = [cfg.strides.index(stride) for stride in cfg.roi_strides]
            used = [channels[MAP_STRIDES.index(stride)] for stride in cfg.strides]
            coarser = rpn_levels - len(used)
            rpn_strides = tuple(cfg.strides[0] << level for level in range(rpn_levels))
            return (
                Pyramid(used, cfg.channels, levels, coarser),
                cfg.channels,
                rpn_strides,
                cfg.roi_strides,
            )
        case _:
            assert_never(cfg)


def build_roi_op(cfg: config.RoIOp, side: int, strides: tuple[int, ...]) -> RoIOperation:
    match cfg:
        case config.RoIAlign():
            return align_operation(side, strides, cfg.samples, cfg.reduce, cfg.aligned)
        case config.RoIPool():
            return pool_operation(side, strides)
        case config.RoIWarp():
            return warp_operation(side, strides, cfg.reduce)
        case _:
            assert_never(cfg)


def build_rpn(cfg: config.ModelConfig, channels: int, strides: tuple[int, ...]) -> RPN | None:
    match cfg.proposals:
        case config.EndToEnd():
            return RPN(
                channels, cfg.anchors.sizes_px, cfg.anchors.ratios, strides, cfg.anchors.rounded
            )
        case config.FixedProposals():
            return None
        case _:
            assert_never(cfg.proposals)


def build_box_branch(cfg: config.ModelConfig, channels: int) -> BoxBranch:
    trunk: nn.Module
    cells = channels * BOX_SIDE * BOX_SIDE
    match cfg.box_head:
        case config.Res5Head():
            trunk, width = MeanTrunk(), channels
        case config.FCHead():
            trunk, width = (
                FCTrunk(cells, [cfg.box_head.width] * cfg.box_head.layers, 0.0),
                cfg.box_head.width,
            )
        case config.VGGHead():
            trunk, width = FCTrunk(cells, [4096, 4096], cfg.box_head.dropout), 4096
        case _:
            assert_never(cfg.box_head)
    first = cfg.background == "first"
    return BoxBranch(
        trunk, width, cfg.num_classes, cfg.class_agnostic_boxes, first, _beta(cfg.box_loss)
    )


def build_mask_branch(
    cfg: config.Mask, num_classes: int, channels: int, side: int
) -> MaskBranch | None:
    """`side` is that of the RoI features; a deconvolution doubles it, an MLP has 28 x 28 outputs."""
    if isinstance(cfg, config.NoMask):
        return None
    masks: SigmoidMasks | SoftmaxMasks
    match cfg.loss:
        case config.SigmoidMask():
            masks = SigmoidMasks(num_classes, cfg.loss.class_agnostic)
            outputs = 1 if cfg.loss.class_agnostic else num_classes
        case config.SoftmaxMask():
            masks, outputs = (
                SoftmaxMasks(cfg.loss.others == "own_class", cfg.loss.inference),
                num_classes + 1,
            )
        case _:
            assert_never(cfg.loss)
    match cfg.head:
        case config.FCNMask():
            head: FCNHead | MLPHead = FCNHead(channels, cfg.head.convs, cfg.head.width, outputs)
            mask_side = 2 * side
        case config.MLPMask():
            mask_side = 2 * MASK_SIDE
            head = MLPHead(
                channels * side * side, cfg.head.layers, cfg.head.width, outputs, mask_side
            )
        case _:
            assert_never(cfg.head)
    return MaskBranch(head, masks, mask_side, cfg.loss_weight)


def build_keypoint_branch(cfg: config.Keypoints, channels: int, side: int) -> KeypointBranch | None:
    match cfg:
        case config.NoKeypoints():
            return None
        case config.KeypointBranch():
            return KeypointBranch(
                channels,
                side,
                cfg.convs,
                cfg.width,
                cfg.num_keypoints,
                cfg.half_pixel_px,
                cfg.loss_weight,
            )
        case _:
            assert_never(cfg)


def _beta(cfg: config.BoxLoss) -> float:
    match cfg:
        case config.L1():
            return 0.0
        case config.SmoothL1():
            return cfg.beta
        case _:
            assert_never(cfg)


def _settings(cfg: config.ModelConfig) -> Settings:
    rpn, sampling, inference, image = cfg.rpn, cfg.sampling, cfg.inference, cfg.image
    return Settings(
        rpn_batch=rpn.batch_per_image,
        rpn_positive_fraction=rpn.positive_fraction,
        rpn_positive_iou=rpn.positive_iou,
        rpn_negative_iou=rpn.negative_iou,
        rpn_beta=_beta(rpn.box_loss),
        pre_nms=(rpn.pre_nms_train, rpn.pre_nms_test),
        post_nms=(rpn.post_nms_train, rpn.post_nms_test),
        rpn_nms_iou=rpn.nms_iou,
        min_side_px=rpn.min_side_px,
        rois_per_image=sampling.rois_per_image,
        roi_positive_fraction=sampling.positive_fraction,
        roi_positive_iou=sampling.positive_iou,
        score_threshold=inference.score_threshold,
        nms_iou=inference.nms_iou,
        detections_per_image=inference.detections_per_image,
        short_side_px=image.short_side_px,
        max_side_px=image.max_side_px,
        canvas_multiple_px=image.canvas_multiple_px,
        resize=image.resize,
        paste_as_torchvision=isinstance(cfg.mask, config.MaskBranch)
        and cfg.mask.paste == "torchvision",
    )
