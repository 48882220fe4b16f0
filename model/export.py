"""Our weights by the names of torchvision and of detectron2: the way back of `model.weights`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contract.model import (
    FPN,
    Anchors,
    BatchNorm,
    FCHead,
    FCNMask,
    FrozenBatchNorm,
    KeypointBranch,
    MaskBranch,
    ModelConfig,
    ResNet,
    SigmoidMask,
)
from model.detector import Detector
from model.structures import Detections

State = dict[str, Tensor]

_EPS = 1e-5  # of their norms
_FIELDS = {
    "norm_weight": "weight",
    "norm_bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}
_STAGES = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}

# Ours to theirs, by prefix. A digit is a layer's number; its offset stands in `_numbered`.
_TORCHVISION = {
    "layout.lateral.": "backbone.fpn.inner_blocks.{}.0.",
    "layout.output.": "backbone.fpn.layer_blocks.{}.0.",
    "rpn.conv.": "rpn.head.conv.0.0.",
    "rpn.objectness.": "rpn.head.cls_logits.",
    "rpn.offsets.": "rpn.head.bbox_pred.",
    "box.trunk.fc.": "roi_heads.box_head.fc{+6}.",
    "box.class_logits.": "roi_heads.box_predictor.cls_score.",
    "box.offsets.": "roi_heads.box_predictor.bbox_pred.",
    "mask.head.convs.": "roi_heads.mask_head.{}.0.",
    "mask.head.deconv.": "roi_heads.mask_predictor.conv5_mask.",
    "mask.head.logits.": "roi_heads.mask_predictor.mask_fcn_logits.",
    "keypoints.convs.": "roi_heads.keypoint_head.{*2}.",
    "keypoints.logits.": "roi_heads.keypoint_predictor.kps_score_lowres.",
}
_DETECTRON2 = {
    "layout.lateral.": "backbone.fpn_lateral{+2}.",
    "layout.output.": "backbone.fpn_output{+2}.",
    "rpn.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.objectness.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.offsets.": "proposal_generator.rpn_head.anchor_deltas.",
    "box.trunk.fc.": "roi_heads.box_head.fc{+1}.",
    "box.class_logits.": "roi_heads.box_predictor.cls_score.",
    "box.offsets.": "roi_heads.box_predictor.bbox_pred.",
    "mask.head.convs.": "roi_heads.mask_head.mask_fcn{+1}.",
    "mask.head.deconv.": "roi_heads.mask_head.deconv.",
    "mask.head.logits.": "roi_heads.mask_head.predictor.",
    "keypoints.convs.": "roi_heads.keypoint_head.conv_fcn{+1}.",
    "keypoints.logits.": "roi_heads.keypoint_head.score_lowres.",
}


def to_torchvision(cfg: ModelConfig, detector: Detector) -> State:
    """The state dict of torchvision's Faster, Mask or Keypoint R-CNN with a ResNet and FPN.

    Raises ValueError with all that torchvision cannot express.
    """
    differences = _unlike_theirs(cfg, "torchvision")
    differences += _unlike(
        [
            ("image.channels", cfg.image.channels, "rgb"),
            ("image.resize", cfg.image.resize, "torchvision-detection"),
            ("rpn.min_side_px", cfg.rpn.min_side_px, 1e-3),
            ("anchors.rounded", cfg.anchors.rounded, True),
            ("roi.samples", getattr(cfg.roi, "samples", 2), 2),
            ("roi.aligned", getattr(cfg.roi, "aligned", False), False),
        ]
    )
    if isinstance(cfg.backbone, ResNet):
        differences += _unlike([("backbone.stride_in_1x1", cfg.backbone.stride_in_1x1, False)])
    if isinstance(cfg.keypoints, KeypointBranch):
        differences += _unlike([("keypoints.half_pixel_px", cfg.keypoints.half_pixel_px, 0.0)])
    _refuse(differences, "torchvision")
    result: State = {}
    for name, value in _classes_moved(cfg, detector, "first").items():
        # their background has offsets and a mask of its own, which nothing reads
        if name.startswith("box.offsets."):
            value = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith("mask.head.logits."):
            value = torch.cat([torch.zeros_like(value[:1]), value])
        result[_renamed(name, _TORCHVISION) or _residual_torchvision(name)] = value.clone()
    return result


def to_detectron2(cfg: ModelConfig, detector: Detector) -> State:
    """The `model` of a detectron2 checkpoint: Faster, Mask or Keypoint R-CNN, R-50/101 with FPN.

    Raises ValueError with all that detectron2 cannot express.
    """
    differences = _unlike_theirs(cfg, "detectron2")
    differences += _unlike(
        [
            ("image.resize", cfg.image.resize, "antialias"),
            ("anchors.rounded", cfg.anchors.rounded, False),
            ("roi.samples", getattr(cfg.roi, "samples", 0), 0),
            ("roi.aligned", getattr(cfg.roi, "aligned", True), True),
        ]
    )
    if isinstance(cfg.keypoints, KeypointBranch):
        differences += _unlike([("keypoints.half_pixel_px", cfg.keypoints.half_pixel_px, 0.5)])
    _refuse(differences, "detectron2")
    state = _classes_moved(cfg, detector, "last")
    return {
        _renamed(name, _DETECTRON2) or _residual_detectron2(name): value.clone()
        for name, value in state.items()
    }


# --- what cannot be expressed ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    field: str
    ours: object
    theirs: object


def _unlike(fields: list[tuple[str, object, object]]) -> list[_Difference]:
    return [_Difference(*field) for field in fields if field[1] != field[2]]


def _unlike_theirs(cfg: ModelConfig, layout: str) -> list[_Difference]:
    """What neither library builds; numbers of training alone, and counts, may differ."""
    backbone, deep = cfg.backbone, (50, 101) if layout == "detectron2" else (18, 34, 50, 101)
    found = _unlike(
        [
            ("backbone.kind", backbone.kind, "resnet"),
            ("layout", cfg.layout, FPN()),
            ("image.canvas_multiple_px", cfg.image.canvas_multiple_px, 32),
            ("anchors.sizes_px", cfg.anchors.sizes_px, Anchors().sizes_px),
            ("anchors.ratios", cfg.anchors.ratios, Anchors().ratios),
            ("proposals.kind", cfg.proposals.kind, "end_to_end"),
            ("roi.kind", cfg.roi.kind, "align"),
            ("roi.reduce", getattr(cfg.roi, "reduce", "mean"), "mean"),
            ("box_head", cfg.box_head, FCHead()),
            ("class_agnostic_boxes", cfg.class_agnostic_boxes, False),
        ]
    )
    if isinstance(backbone, ResNet):
        if backbone.depth not in deep:
            found.append(_Difference("backbone.depth", backbone.depth, deep))
        if not isinstance(backbone.norm, FrozenBatchNorm | BatchNorm):
            found.append(_Difference("backbone.norm.kind", backbone.norm.kind, "frozen_bn"))
    if isinstance(cfg.mask, MaskBranch):
        found += _unlike(
            [("mask.head", cfg.mask.head, FCNMask()), ("mask.loss", cfg.mask.loss, SigmoidMask())]
        )
    if isinstance(cfg.keypoints, KeypointBranch):
        usual = KeypointBranch()
        found += _unlike(
            [
                ("keypoints.convs", cfg.keypoints.convs, usual.convs),
                ("keypoints.width", cfg.keypoints.width, usual.width),
                ("mask.kind", cfg.mask.kind, "none"),
            ]
        )
    return found


def _refuse(differences: list[_Difference], library: str) -> None:
    if not differences:
        return
    words = [f"{d.field} is {_words(d.ours)}, not {_words(d.theirs)}" for d in differences]
    raise ValueError(
        f"{library} cannot express this model: {'; '.join(words)}; "
        f"preset r50-fpn-{library} has what it can"
    )


def _words(value: object) -> str:
    """A record by what differs from its defaults."""
    sparse = getattr(value, "sparse", None)
    if sparse is None:
        return repr(value)
    return ", ".join(f"{name} {given!r}" for name, given in sparse().items()) or "the default"


# --- values ---------------------------------------------------------------------------------------


def _classes_moved(cfg: ModelConfig, detector: Detector, background: str) -> State:
    """Our state dict with the background's class where they have it, and their norms' epsilon."""
    state = dict(detector.state_dict())
    if cfg.background != background:
        shift = 1 if background == "first" else -1
        for name in ("box.class_logits.weight", "box.class_logits.bias"):
            state[name] = state[name].roll(shift, dims=0)
    eps = 0.0
    if isinstance(cfg.backbone, ResNet) and isinstance(cfg.backbone.norm, FrozenBatchNorm):
        eps = cfg.backbone.norm.eps
        for name in [n for n in state if n.endswith(".norm_weight") and eps != _EPS]:
            variance = state[name.removesuffix("norm_weight") + "running_var"].double()
            # weight / sqrt(variance + eps) stays; torchvision's releases have eps 0
            scaled = state[name].double() * ((variance + _EPS) / (variance + eps)).sqrt()
            if not scaled.isfinite().all():
                raise ValueError(
                    f"{name}: a variance of 0 with backbone.norm.eps 0 cannot be written with "
                    f"their epsilon of {_EPS:g}"
                )
            state[name] = scaled.to(state[name].dtype)
    # no evaluation reads the counters of batch-norm, and neither library asks for them
    return {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}


# --- names ----------------------------------------------------------------------------------------


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    """Their name of a layer outside the ResNet; "" for one inside."""
    for prefix, theirs in rules.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if "{" not in theirs:
            return theirs + rest
        number, _, rest = rest.partition(".")
        return _numbered(theirs, int(number)) + rest
    return ""


def _numbered(pattern: str, number: int) -> str:
    """`{}` is the number, `{+2}` the number and two, `{*2}` twice the number."""

    def value(found: re.Match[str]) -> str:
        text = found[1]
        if not text:
            return str(number)
        by = int(text[1:])
        return str(number + by if text[0] == "+" else number * by)

    return re.sub(r"\{([+*]?\d*)\}", value, pattern)


def _residual_torchvision(name: str) -> str:
    """`backbone.layer1.0.conv1.norm_weight` to `backbone.body.layer1.0.bn1.weight`."""
    inside = name.removeprefix("backbone.")
    layer, _, field = inside.rpartition(".")
    if field in _FIELDS:  # folded into its convolution
        layer = re.sub(r"conv(\d)$", r"bn\1", layer)
        layer = re.sub(r"downsample\.0$", "downsample.1", layer)
        field = _FIELDS[field]
    return f"backbone.body.{layer}.{field}"


def _residual_detectron2(name: str) -> str:
    """`backbone.layer1.0.conv1.norm_weight` to `backbone.bottom_up.res2.0.conv1.norm.weight`."""
    layer, _, field = name.removeprefix("backbone.").rpartition(".")
    norm = re.search(r"(?:^|\.)bn(\d)$", layer)  # a trained norm has a module of its own
    if field in _FIELDS or norm or layer.endswith("downsample.1"):
        field = f"norm.{_FIELDS.get(field, field)}"
        layer = re.sub(r"bn(\d)$", r"conv\1", layer)
        layer = layer.replace("downsample.1", "downsample.0")
    layer = layer.replace("downsample.0", "shortcut")
    stage, dot, rest = layer.partition(".")
    where = f"{_STAGES[stage]}{dot}{rest}" if stage in _STAGES else f"stem.{layer}"
    return f"backbone.bottom_up.{where}.{field}"


# --- a program ------------------------------------------------------------------------------------


class ImageProgram(nn.Module):
    """A detector as a function of one image, all of whose shapes are fixed, for `torch.export`.

    The image is uint8 RGB (3, H, W). The outputs are those of `Detections` for a batch of one:
    boxes (1, D, 4) in its pixels, scores, labels from 0 on, valid, and then masks (1, D, M, M) and
    keypoints (1, D, P, 3) where the model has them.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        detector.keep_padding = True  # else the number of detections would be a shape

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        found: Detections = self.detector.detect_image(image)
        more = [*list(found.masks.values())[:1]]
        if self.detector.keypoints is not None:
            more.append(found.keypoints)
        return (found.boxes_xyxy, found.scores, found.labels, found.valid, *more)
