"""Weights from elsewhere: torchvision's classifiers and detectors, and detectron2's model zoo, by
name and strictly.

What a layout cannot say in names is config: see the presets `r50-fpn-torchvision` and
`r50-fpn-detectron2` for the conventions (channel order, strides, anchors, where the background
stands) that go with each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.detector import Detector

State = dict[str, Tensor]

_UNUSED_COCO_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

_NORM_FIELDS = {
    "weight": "norm_weight",
    "bias": "norm_bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}

# torchvision's detectors; the names in brackets are those of the files released before version 0.13
_TORCHVISION = (
    (r"backbone\.body\.(.*)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"layout.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"layout.output.\1.\2"),
    (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn.conv.\1"),
    (r"rpn\.head\.cls_logits\.(.*)", r"rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.*)", r"rpn.offsets.\1"),
    (r"roi_heads\.box_head\.fc6\.(.*)", r"box.trunk.fc.0.\1"),
    (r"roi_heads\.box_head\.fc7\.(.*)", r"box.trunk.fc.1.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box.class_logits.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box.offsets.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(.*)", r"mask.head.convs.\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", r"mask.head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", r"mask.head.logits.\1"),
    (r"roi_heads\.keypoint_predictor\.kps_score_lowres\.(.*)", r"keypoints.logits.\1"),
)

_DETECTRON2 = (
    (r"proposal_generator\.rpn_head\.conv\.(.*)", r"rpn.conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.*)", r"rpn.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.*)", r"rpn.offsets.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box.class_logits.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box.offsets.\1"),
    (r"roi_heads\.mask_head\.deconv\.(.*)", r"mask.head.deconv.\1"),
    (r"roi_heads\.mask_head\.predictor\.(.*)", r"mask.head.logits.\1"),
    (r"roi_heads\.keypoint_head\.score_lowres\.(.*)", r"keypoints.logits.\1"),
)


# names that only files of the layout have
_MARKS = {
    "backbone": ("conv1.weight", "features.0.weight"),
    "maskray": ("box.class_logits.weight",),
    "torchvision": ("backbone.body.conv1.weight",),
    "detectron2": ("proposal_generator.rpn_head.conv.weight",),
}


def load_initial(detector: Detector, state: Mapping[str, Tensor], layout: str) -> None:
    """Loads `state` in place. Raises ValueError if a tensor is missing, left over or of another
    shape.

    layout: "backbone" is a torchvision classifier's (its ImageNet classes are dropped, and so are
    stages that the model does not build), "maskray" a detector of ours, "torchvision" and
    "detectron2" a whole detector of theirs.
    """
    _check_layout(state, layout)
    if layout == "torchvision":
        state = _of_used_classes(state, detector.box.num_classes)
    match layout:
        case "backbone":
            _load_backbone(detector, state)
        case "maskray":
            _load_strictly(detector, state, {name: name for name in state}, layout)
        case "torchvision":
            _load_strictly(detector, from_torchvision(state), _torchvision_names(state), layout)
        case "detectron2":
            _load_strictly(detector, from_detectron2(state), _detectron2_names(state), layout)


def from_torchvision(state: Mapping[str, Tensor]) -> State:
    """The state dict of `maskrcnn_resnet50_fpn` or `keypointrcnn_resnet50_fpn` in our names.

    Channels of the background class go where we have none: box offsets and sigmoid masks. Raises
    ValueError at a name that it does not know.
    """
    result: State = {}
    # Class logits keep the background: `background: first` says where it stands.
    for ours, name in _torchvision_names(state).items():
        value = state[name]
        if ours.startswith("box.offsets."):
            value = value[4:]  # four offsets of the background, which has no box
        elif ours.startswith("mask.head.logits."):
            value = value[1:]  # the background's mask, which torchvision never trains
        result[ours] = value
    return result


def _of_used_classes(state: Mapping[str, Tensor], num_classes: int) -> Mapping[str, Tensor]:
    """The released detector of COCO's ids 1 to 90 for a model of COCO's 80 categories.

    Others stay as they are. COCO uses 80 of the ids, and packed data have those alone.
    """
    classes = "roi_heads.box_predictor.cls_score.bias"
    if num_classes != 80 or classes not in state or len(state[classes]) != 91:
        return state
    rows = torch.tensor([row for row in range(91) if row not in _UNUSED_COCO_IDS])
    kept = {
        "roi_heads.box_predictor.cls_score.": rows,
        "roi_heads.box_predictor.bbox_pred.": (4 * rows[:, None] + torch.arange(4)).flatten(),
        "roi_heads.mask_predictor.mask_fcn_logits.": rows,
    }
    return {
        name: next((value[some] for start, some in kept.items() if name.startswith(start)), value)
        for name, value in state.items()
    }


def from_detectron2(state: Mapping[str, Any]) -> State:
    """The "model" of a detectron2 model-zoo file (R-50/101 C4 or FPN) in our names.

    Arrays may be numpy's.
    """
    return {ours: torch.as_tensor(state[name]) for ours, name in _detectron2_names(state).items()}


def _torchvision_names(state: Iterable[str]) -> dict[str, str]:
    """Our names to torchvision's."""
    return {
        _fold_name(
            _translate(_old_mask_names(_keypoint_conv(name)), _TORCHVISION, "torchvision")
        ): name
        for name in state
        if not name.endswith("num_batches_tracked")
    }


def _detectron2_names(state: Iterable[str]) -> dict[str, str]:
    """Our names to detectron2's."""
    return {
        _detectron2_name(name): name
        for name in state
        if "anchor_generator" not in name and name not in ("pixel_mean", "pixel_std")
    }


def _translate(name: str, rules: tuple[tuple[str, str], ...], layout: str) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    if name.startswith(("keypoints.", "mask.")):
        return name
    raise ValueError(
        f"{layout} state dict: unknown tensor {name!r}; "
        "expected a Mask R-CNN or Keypoint R-CNN with FPN"
    )


def _keypoint_conv(name: str) -> str:
    """torchvision's keypoint head is a sequence of (conv, relu)."""
    found = re.fullmatch(r"roi_heads\.keypoint_head\.(\d+)\.(.*)", name)
    return f"keypoints.convs.{int(found[1]) // 2}.{found[2]}" if found else name


def _old_mask_names(name: str) -> str:
    found = re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d)\.(.*)", name)
    return f"mask.head.convs.{int(found[1]) - 1}.{found[2]}" if found else name


def _fold_name(name: str) -> str:
    """`X.bn1.weight` and `X.downsample.1.weight` to where a folded convolution keeps its norm."""
    found = re.fullmatch(
        r"(.*)(?:bn(\d)|downsample\.(1))\.(weight|bias|running_mean|running_var)", name
    )
    if found is None:
        return name
    conv = f"conv{found[2]}" if found[2] else "downsample.0"
    return f"{found[1]}{conv}.{_NORM_FIELDS[found[4]]}"


def _detectron2_name(name: str) -> str:
    # FPN models have the ResNet as `backbone.bottom_up`, C4 models as `backbone`.
    name = name.removeprefix("backbone.bottom_up.")
    for pattern, part in (
        (r"(?:backbone\.)?fpn_lateral(\d)\.(.*)", "layout.lateral"),
        (r"(?:backbone\.)?fpn_output(\d)\.(.*)", "layout.output"),
    ):
        if found := re.fullmatch(pattern, name):
            return f"{part}.{int(found[1]) - 2}.{found[2]}"
    for pattern, part in (
        (r"roi_heads\.box_head\.fc(\d)\.(.*)", "box.trunk.fc"),
        (r"roi_heads\.mask_head\.mask_fcn(\d)\.(.*)", "mask.head.convs"),
        (r"roi_heads\.keypoint_head\.conv_fcn(\d)\.(.*)", "keypoints.convs"),
    ):
        if found := re.fullmatch(pattern, name):
            return f"{part}.{int(found[1]) - 1}.{found[2]}"
    residual = _detectron2_residual(name.removeprefix("backbone."))
    return residual or _translate(name, _DETECTRON2, "detectron2")


def _detectron2_residual(name: str) -> str:
    """`res3.0.conv1.norm.weight` and its like, or "" for what is no part of the ResNet."""
    found = re.fullmatch(
        r"(?:roi_heads\.)?(stem|res\d)\.(?:(\d+)\.)?(conv\d|shortcut)\.(norm\.)?(\w+)", name
    )
    if found is None:
        return ""
    stage, block, conv, norm, field = found.groups()
    conv = "downsample.0" if conv == "shortcut" else conv
    field = _NORM_FIELDS[field] if norm else field
    if stage == "stem":
        return f"backbone.{conv}.{field}"
    where = "crops.res5" if name.startswith("roi_heads.") else f"backbone.layer{int(stage[3:]) - 1}"
    return f"{where}.{block}.{conv}.{field}"


def _check_layout(state: Mapping[str, Tensor], layout: str) -> None:
    """Raises ValueError if there is no such layout, or if the names in `state` are those of
    another.
    """
    if layout not in _MARKS:
        raise ValueError(f"no weights layout {layout!r}; there are {', '.join(_MARKS)}")
    for other, marks in _MARKS.items():
        if other != layout and (found := [mark for mark in marks if mark in state]):
            raise ValueError(
                f"weights in layout {layout!r}: the file has {found[0]!r}; use layout: {other}"
            )


def _load_backbone(detector: Detector, state: Mapping[str, Tensor]) -> None:
    # Whole layers of the file may have no place here, but a layer that has one must fit.
    own = detector.state_dict()
    names = {_backbone_name(name, own): name for name in state if _is_wanted(name, own)}
    expected = {name for name in own if name.startswith(("backbone.", "crops.res5."))}
    if "classifier.0.weight" in state:
        expected |= {name for name in own if name.startswith("box.trunk.fc.")}
    # files from before torch 0.4.1 have no such counters, and a norm with momentum reads none
    expected -= {name for name in own if name.endswith("num_batches_tracked")} - names.keys()
    _check_names(expected, names, "backbone")
    _load_strictly(
        detector, {**own, **{ours: state[name] for ours, name in names.items()}}, names, "backbone"
    )


def _is_wanted(name: str, own: Mapping[str, Tensor]) -> bool:
    """False for ImageNet's classes, the counters of norms without any, and stages that the model
    does not build.
    """
    if name.startswith(("fc.", "classifier.6.")):
        return False
    if name.endswith("num_batches_tracked") and not any(
        mine.endswith("num_batches_tracked") for mine in own
    ):
        return False
    if re.match(r"layer[1-4]\.", name):
        stage = _backbone_name(name.partition(".")[0] + ".", own)
        return any(mine.startswith(stage) for mine in own)
    return True


def _backbone_name(name: str, own: Mapping[str, Tensor]) -> str:
    """Our name of a classifier's tensor."""
    if found := re.fullmatch(r"classifier\.(0|3)\.(.*)", name):  # VGG's fc6 and fc7
        return f"box.trunk.fc.{int(found[1]) // 3}.{found[2]}"
    if "backbone.conv1.norm_weight" in own:
        name = _fold_name(name)
    if name.startswith("layer4.") and "crops.res5.0.conv1.weight" in own:
        return f"crops.res5.{name.removeprefix('layer4.')}"
    return f"backbone.{name}"


def _check_names(expected: set[str], names: Mapping[str, str], layout: str) -> None:
    """names: ours to the file's."""
    missing, unknown = sorted(expected - names.keys()), sorted(names.keys() - expected)
    if missing or unknown:
        what = (
            f"lacks {missing[0]!r}"
            if missing
            else f"has {names[unknown[0]]!r}, which the model has not"
        )
        more = len(missing) + len(unknown) - 1
        raise ValueError(
            f"weights in layout {layout!r}: the file {what}"
            + (f" (and {more} more)" if more else "")
            + "; check that backbone, norm, layout and tasks are those of the file"
        )


def _load_strictly(
    detector: Detector, state: Mapping[str, Tensor], names: Mapping[str, str], layout: str
) -> None:
    """names: ours to the file's; what is in `state` alone is the detector's own."""
    # All checks come before the first write: a file that does not fit leaves the detector as it
    # was.
    own = detector.state_dict()
    _check_names(set(own), {name: names.get(name, name) for name in state}, layout)
    for name, value in state.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"weights: {names[name]!r} has shape {tuple(value.shape)}, "
                f"the model {tuple(own[name].shape)}; "
                "check num_classes and the widths in the config"
            )
        if own[name].is_floating_point() and not value.is_floating_point():
            raise ValueError(
                f"weights: {names[name]!r} is {value.dtype}, the model's is {own[name].dtype}; "
                "save floating-point weights"
            )
    detector.load_state_dict(dict(state), strict=True)
