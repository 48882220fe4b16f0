"""The run behind each published row: a preset, and what the paper's table changes in it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from pydantic import JsonValue

from contract.model import ResNet
from contract.presets import run_preset
from contract.recipe import RunConfig, apply_overrides, parse_run
from orchestrator.study.paper import BASELINE_ROW, paper_tables

# The paper's runs are on trainval35k, which is train2017, and on minival, which is val2017.
TRAIN_IMAGES, VAL_IMAGES, VAL_SPLIT = 118_287, 5_000, "minival"

_Overrides = Mapping[str, JsonValue]

# What our presets do not have: weights of MSRA's Caffe ResNets, and an RPN for each backbone
# that trains alone, as a first stage whose proposals all arms share (section 4).
_SOURCES: _Overrides = {
    "model.weights": {"kind": "file", "path": "MSRA's ImageNet weights"},
    "model.proposals": {"kind": "fixed", "uri": "those of an RPN trained alone"},
}
# What belongs to those weights (Detectron's PIXEL_MEANS and STRIDE_1X1).
_PIXELS: _Overrides = {
    "model.image.mean": [102.9801, 115.9465, 122.7717],
    "model.image.std": [1.0, 1.0, 1.0],
    "model.image.channels": "bgr",
}
_STRIDE: _Overrides = {"model.backbone.stride_in_1x1": True}
_MAIN: _Overrides = {**_SOURCES, "model.inference.nms_iou": 0.3}
_UPDATED: _Overrides = {  # Table 8: 180k steps with drops at 120k and 160k, boxes' NMS at 0.5
    **_SOURCES,
    "loop.steps": 180_000,
    "schedule.drop_steps": [120_000, 160_000],
}
_POOL: _Overrides = {"model.roi": {"kind": "pool"}}
_NO_MASKS: _Overrides = {"model.mask": {"kind": "none"}}
_MASKS: _Overrides = {"model.mask": {"kind": "mask"}}
_NO_KEYPOINTS: _Overrides = {"model.keypoints": {"kind": "none"}}


def _align(reduce: str) -> _Overrides:
    return {"model.roi.reduce": reduce}


def _warp(reduce: str) -> _Overrides:
    return {"model.roi": {"kind": "warp", "reduce": reduce}}


# table -> row -> (preset, overrides). A row that is missing has no run that our presets describe.
_RUNS: Mapping[str, Mapping[str, tuple[str, _Overrides]]] = {
    "1": {
        "Mask R-CNN R101-C4": ("r101-c4", _MAIN),
        "Mask R-CNN R101-FPN": ("r101-fpn", _MAIN),
        "Mask R-CNN X101-FPN": ("x101-64x4d-fpn", _MAIN),
    },
    "2a": {
        "R50-C4": ("r50-c4", _MAIN),
        "R101-C4": ("r101-c4", _MAIN),
        "R50-FPN": ("r50-fpn", _MAIN),
        "R101-FPN": ("r101-fpn", _MAIN),
        "X101-64x4d-FPN": ("x101-64x4d-fpn", _MAIN),
    },
    "2b": {
        "softmax": ("r50-c4", {**_MAIN, "model.mask.loss": {"kind": "softmax"}}),
        "sigmoid": ("r50-c4", _MAIN),
    },
    "2c": {
        "RoIPool": ("r50-c4", {**_MAIN, **_POOL}),
        "RoIWarp-max": ("r50-c4", {**_MAIN, **_warp("max")}),
        "RoIWarp-ave": ("r50-c4", {**_MAIN, **_warp("mean")}),
        "RoIAlign-max": ("r50-c4", {**_MAIN, **_align("max")}),
        "RoIAlign-ave": ("r50-c4", {**_MAIN, **_align("mean")}),
    },
    "2d": {
        "RoIPool": ("r50-c5", {**_MAIN, **_POOL}),
        "RoIAlign": ("r50-c5", _MAIN),
    },
    "2e": {
        "MLP-2fc (1024,1024,80*28^2)": (
            "r50-fpn",
            {**_MAIN, "model.mask.head": {"kind": "mlp", "layers": 2}},
        ),
        "MLP-3fc (1024,1024,1024,80*28^2)": (
            "r50-fpn",
            {**_MAIN, "model.mask.head": {"kind": "mlp", "layers": 3}},
        ),
        "FCN (conv 256 x5, 80)": ("r50-fpn", _MAIN),
    },
    "text-agnostic": {
        "class-specific": ("r50-c4", _MAIN),
        "class-agnostic": ("r50-c4", {**_MAIN, "model.mask.loss.class_agnostic": True}),
    },
    "text-fpn-align": {
        BASELINE_ROW: ("r50-fpn", {**_MAIN, **_POOL}),
        "difference": ("r50-fpn", _MAIN),
    },
    "3": {
        "Faster R-CNN, RoIAlign, R101-FPN": ("r101-fpn", {**_MAIN, **_NO_MASKS}),
        "Mask R-CNN, R101-FPN": ("r101-fpn", _MAIN),
        "Mask R-CNN, X101-FPN": ("x101-64x4d-fpn", _MAIN),
    },
    "4": {
        "keypoint only": ("r50-fpn-keypoint", _SOURCES),
        "keypoint + mask": ("r50-fpn-keypoint", {**_SOURCES, **_MASKS}),
    },
    "5": {
        "Faster R-CNN": ("r50-fpn-keypoint", {**_SOURCES, **_NO_KEYPOINTS}),
        "mask only": ("r50-fpn-keypoint", {**_SOURCES, **_NO_KEYPOINTS, **_MASKS}),
        "keypoint only": ("r50-fpn-keypoint", _SOURCES),
        "keypoint + mask": ("r50-fpn-keypoint", {**_SOURCES, **_MASKS}),
    },
    "6": {
        "RoIPool": ("r50-fpn-keypoint", {**_SOURCES, **_POOL}),
        "RoIAlign": ("r50-fpn-keypoint", _SOURCES),
    },
    "8": {
        "original baseline X101-FPN": ("x101-64x4d-fpn", _MAIN),
        "updated baseline": ("x101-64x4d-fpn", _UPDATED),
        "end-to-end training": (
            "x101-64x4d-fpn",
            {**_UPDATED, "model.proposals": {"kind": "end_to_end"}},
        ),
    },
}


@cache
def published_run(table: str, row: str) -> RunConfig | None:
    """The run behind a row, with every default written out; None where no preset describes it."""
    if row not in _RUNS.get(table, {}):
        return None
    preset, overrides = _RUNS[table][row]
    places = {"data.train": "trainval35k", "data.val": VAL_SPLIT}
    # Parsed before the overrides: they name fields of records that the preset leaves out.
    whole = parse_run(apply_overrides(run_preset(preset), places), f"table {table}")
    caffe = {**_PIXELS, **(_STRIDE if isinstance(whole.model.backbone, ResNet) else {})}
    changed = apply_overrides(whole.model_dump(mode="json"), {**caffe, **overrides})
    return parse_run(changed, f"table {table}")


def is_of_val2017(table: str) -> bool:
    """Whether the table's AP is on the images that anybody can evaluate on."""
    return paper_tables()[table].split == VAL_SPLIT
