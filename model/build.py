"""From a config to a detector of torch's own modules. Only this code reads `contract.model`.

No I/O: pretrained weights come later (`model.weights`), and so do our kernels
(`model.accelerate`).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, assert_never, cast

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
from model.branches.box import BoxBranch, BoxSelection, FCTrunk, MeanTrunk
from model.branches.keypoint import KeypointBranch
from model.branches.mask import (
    FCNHead,
    Head,
    MaskBranch,
    Masks,
    MLPHead,
    Paste,
    SigmoidMasks,
    SoftmaxMasks,
)
from model.branches.paste import paste_all, paste_all_torchvision
from model.detector import Detector
from model.initial import initialise
from model.pixels import ImageSize, Normalise
from model.roi.crops import SeparateCrops, SharedCrops
from model.roi.operations import Align, Pool, RoIOperation, Warp
from model.roi.sampling import RoISampler
from model.rpn.network import RPN, AnchorSampler
from model.rpn.proposals import Counts, FixedProposals, ProposalFilter

BOX_SIDE, MASK_SIDE = 7, 14  # of RoI features (Mask R-CNN, Fig. 4)
RESNEXTS = {  # depth, groups, width of a group
    "50-32x4d": (50, 32, 4),
    "101-32x8d": (101, 32, 8),
    "101-64x4d": (101, 64, 4),
}
MAP_STRIDES = (4, 8, 16, 32)  # of res2 to res5
VGG_CHANNELS = 512


def build_detector(cfg: config.ModelConfig, seed: int = 0) -> Detector:
    """The detector with its initial parameters, each drawn from (seed, its name)."""
    # torch's own initialisation draws from the global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        detector = assemble(cfg)
    initialise(detector, seed)
    return detector


def assemble(cfg: config.ModelConfig) -> Detector:
    """The detector with parameters as torch leaves them."""
    backbone, channels = build_backbone(cfg.backbone, _num_stages(cfg.layout))
    layout, width, rpn_strides, roi_strides = build_layout(
        cfg.layout, channels, len(cfg.anchors.sizes_px)
    )
    roi = partial(build_roi_op, cfg.roi, strides=roi_strides)
    proposals = build_proposals(cfg, width, rpn_strides)
    crops: SeparateCrops | SharedCrops
    if isinstance(cfg.layout, config.C4):
        # A 14 x 14 crop is halved by res5's own stride, a 7 x 7 crop keeps its side.
        res5 = build_res5(cfg.backbone, halves=cfg.layout.roi_side == 2 * BOX_SIDE)
        crops, width, side = SharedCrops(roi(cfg.layout.roi_side), res5), channels[-1], BOX_SIDE
    else:
        side = _mask_crop_side(cfg.mask)
        crops = SeparateCrops(roi(BOX_SIDE), roi(side))
    return Detector(
        *build_image_input(cfg.image),
        backbone,
        layout,
        proposals,
        build_roi_sampler(cfg.sampling, cfg.num_classes),
        crops,
        build_box_branch(cfg, width),
        build_mask_branch(cfg.mask, cfg.num_classes, width, side),
        build_keypoint_branch(cfg.keypoints, width, side),
    )


def _mask_crop_side(cfg: config.Mask) -> int:
    """Cells of the crop that masks and keypoints read, where it is not the box head's."""
    if isinstance(cfg, config.MaskBranch) and isinstance(cfg.head, config.MLPMask):
        return cfg.head.input_side
    return MASK_SIDE


def build_image_input(cfg: config.ImageInput) -> tuple[Normalise, ImageSize]:
    """How pixels enter, and the size of an image at test time."""
    return (
        Normalise(cfg.mean, cfg.std, cfg.channels == "bgr"),
        ImageSize(cfg.short_side_px, cfg.max_side_px, cfg.canvas_multiple_px, cfg.resize),
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
    """The image network up to that stage, and the channels of its maps.

    Of a residual network these are res2 to res5, of VGG its one map.
    """
    match cfg:
        case config.ResNet() | config.ResNeXt():
            network = _residual(cfg)
            return ResNetMaps(network, stages, cfg.frozen_stages), feature_channels(network)
        case config.VGG16():
            return VGGMaps(cfg.frozen_stages), [VGG_CHANNELS]
        case _:
            assert_never(cfg)


def build_res5(cfg: config.Backbone, halves: bool) -> nn.Module:
    """The last residual stage as the RoI head of C4.

    It halves its input with its own stride of 2 if `halves`, else it has stride 1.
    """
    # The config refuses C4 with VGG-16, which has no residual stages.
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
            # Batch-norm, to be folded into the convolutions with its pretrained statistics.
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
            # Anchor levels beyond the maps, as P6, read maps that halve the last one.
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
    """The operation at one side, over the maps of these strides."""
    match cfg:
        case config.RoIAlign():
            return RoIOperation(Align(cfg.samples, cfg.reduce, cfg.aligned), side, strides)
        case config.RoIPool():
            return RoIOperation(Pool(), side, strides)
        case config.RoIWarp():
            return RoIOperation(Warp(cfg.reduce), side, strides)
        case _:
            assert_never(cfg)


def build_proposals(
    cfg: config.ModelConfig, channels: int, strides: tuple[int, ...]
) -> RPN | FixedProposals:
    """The source of proposals: an RPN on maps of these channels and strides, or the batch."""
    match cfg.proposals:
        case config.EndToEnd():
            return build_rpn(cfg.rpn, cfg.anchors, channels, strides)
        case config.FixedProposals():
            return FixedProposals(cfg.rpn.post_nms_train, cfg.rpn.post_nms_test)
        case _:
            assert_never(cfg.proposals)


def build_rpn(
    cfg: config.RPN, anchors: config.Anchors, channels: int, strides: tuple[int, ...]
) -> RPN:
    """The RPN on maps of these channels and strides."""
    sampler = AnchorSampler(
        cfg.batch_per_image, cfg.positive_fraction, cfg.positive_iou, cfg.negative_iou
    )
    proposals = ProposalFilter(
        Counts(cfg.pre_nms_train, cfg.post_nms_train),
        Counts(cfg.pre_nms_test, cfg.post_nms_test),
        cfg.nms_iou,
        cfg.min_side_px,
    )
    return RPN(
        channels,
        anchors.sizes_px,
        anchors.ratios,
        strides,
        anchors.rounded,
        sampler,
        proposals,
        _beta(cfg.box_loss),
    )


def build_roi_sampler(cfg: config.RoISampling, num_classes: int) -> RoISampler:
    """Which RoIs train the heads."""
    return RoISampler(num_classes, cfg.rois_per_image, cfg.positive_fraction, cfg.positive_iou)


def build_box_branch(cfg: config.ModelConfig, channels: int) -> BoxBranch:
    """The box branch on RoI features of these channels."""
    trunk: nn.Module
    cells = channels * BOX_SIDE * BOX_SIDE
    match cfg.box_head:
        case config.Res5Head():
            trunk, width = MeanTrunk(), channels
        case config.FCHead():
            width = cfg.box_head.width
            trunk = FCTrunk(cells, [width] * cfg.box_head.layers, 0.0)
        case config.VGGHead():
            trunk, width = FCTrunk(cells, [4096, 4096], cfg.box_head.dropout), 4096
        case _:
            assert_never(cfg.box_head)
    return BoxBranch(
        trunk,
        width,
        cfg.num_classes,
        cfg.class_agnostic_boxes,
        cfg.background == "first",
        _beta(cfg.box_loss),
        build_box_selection(cfg.inference),
        cfg.box_loss_weight,
    )


def build_box_selection(cfg: config.BoxInference) -> BoxSelection:
    """Which boxes become detections."""
    return BoxSelection(cfg.score_threshold, cfg.nms_iou, cfg.detections_per_image)


def build_mask_branch(
    cfg: config.Mask, num_classes: int, channels: int, side: int
) -> MaskBranch | None:
    """`side` is that of the RoI features.

    A deconvolution doubles it, an MLP has 28 x 28 outputs.
    """
    if isinstance(cfg, config.NoMask):
        return None
    outputs = cfg.loss.num_channels(num_classes)
    head: Head
    match cfg.head:
        case config.FCNMask():
            mask_side = 2 * side
            head = FCNHead(channels, cfg.head.convs, cfg.head.width, outputs)
        case config.MLPMask():
            mask_side = 2 * MASK_SIDE
            cells = channels * side * side
            head = MLPHead(cells, cfg.head.layers, cfg.head.width, outputs, mask_side)
        case _:
            assert_never(cfg.head)
    masks = build_mask_loss(cfg.loss, num_classes)
    return MaskBranch(head, masks, mask_side, cfg.loss_weight, build_paste(cfg.paste))


def build_mask_loss(cfg: config.MaskLoss, num_classes: int) -> Masks:
    """The meaning of the mask head's logits."""
    match cfg:
        case config.SigmoidMask():
            return SigmoidMasks(num_classes, cfg.class_agnostic)
        case config.SoftmaxMask():
            return SoftmaxMasks(cfg.others == "own_class", cfg.inference)
        case _:
            assert_never(cfg)


def build_paste(
    convention: Literal["pixel_centres", "torchvision"],
) -> Paste:
    """How `predict_image` pastes masks into the image."""
    match convention:
        case "pixel_centres":
            return paste_all
        case "torchvision":
            return paste_all_torchvision
        case _:
            assert_never(convention)


def build_keypoint_branch(cfg: config.Keypoints, channels: int, side: int) -> KeypointBranch | None:
    """`side` is that of the RoI features, `channels` their channels."""
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
    # `model.losses.smooth_l1` takes 0 as the limit, the absolute value.
    match cfg:
        case config.L1():
            return 0.0
        case config.SmoothL1():
            return cfg.beta
        case _:
            assert_never(cfg)
