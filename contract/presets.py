"""The detectors of the paper and of the released code by name, each with its recipe."""

from __future__ import annotations

import difflib
from typing import assert_never

from pydantic import JsonValue

from contract.model import (
    C4,
    C5,
    FPN,
    RPN,
    VGG16,
    Anchors,
    Conv5,
    FCHead,
    FCNMask,
    FileWeights,
    GroupNorm,
    ImageInput,
    KeypointBranch,
    MaskBranch,
    MLPMask,
    ModelConfig,
    NoMask,
    NoWeights,
    Res5Head,
    ResNet,
    ResNeXt,
    RoIAlign,
    RoIPool,
    RoISampling,
    SmoothL1,
    SoftmaxMask,
    TorchvisionWeights,
    VGGHead,
)
from contract.recipe import copied


def _changed(base: ModelConfig, **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({**dict(base), **fields})


# What the released code of the paper (Detectron, its configs of December 2017 and its defaults)
# has, and the defaults in `contract.model` do not: smooth L1 with beta 1/9 in the RPN and 1 on
# RoIs, and RoIAlign that puts pixel centres at whole numbers.
_PUBLISHED: dict[str, object] = {
    "box_loss": SmoothL1(beta=1.0),
    "roi": RoIAlign(aligned=False),
}

_C4_ANCHORS = Anchors(sizes_px=((32, 64, 128, 256, 512),))

_C4 = ModelConfig(
    layout=C4(),
    anchors=_C4_ANCHORS,
    rpn=RPN(pre_nms_train=12000, pre_nms_test=6000, post_nms_train=2000, post_nms_test=300),
    sampling=RoISampling(rois_per_image=64),
    box_head=Res5Head(),
    mask=MaskBranch(head=FCNMask(convs=0)),
)

_PAPER_C4 = _changed(_C4, **_PUBLISHED, rpn=_C4.rpn.model_copy(update={"box_loss": SmoothL1()}))

_R50_FPN = ModelConfig()

_PAPER_FPN = _changed(_R50_FPN, **_PUBLISHED, rpn=RPN(box_loss=SmoothL1()))

_KEYPOINTS = KeypointBranch()

# Torchvision's detectors: 90 foreground classes are the sparse COCO ids 1 to 90, less one.
_R50_FPN_TORCHVISION = _changed(
    _R50_FPN,
    num_classes=90,
    image=ImageInput(resize="torchvision-detection"),
    anchors=Anchors(rounded=True),
    rpn=RPN(pre_nms_train=2000, post_nms_train=2000, box_loss=SmoothL1()),
    roi=RoIAlign(aligned=False),
    box_loss=SmoothL1(),
    background="first",
    mask=MaskBranch(paste="torchvision"),
)

# Detectron2's model zoo: BGR pixels that are not divided by a deviation, Caffe's ResNet, and in
# RoIAlign as many samples as a bin has cells.
_DETECTRON2: dict[str, object] = {
    "backbone": ResNet(stride_in_1x1=True),
    "image": ImageInput(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channels="bgr"),
    "roi": RoIAlign(samples=0),
}


def _zoo(file: str) -> FileWeights:
    return FileWeights(path=file, layout="detectron2")


PRESETS: dict[str, ModelConfig] = {
    "vgg16-faster-rcnn": ModelConfig(
        backbone=VGG16(),
        image=ImageInput(short_side_px=600, max_side_px=1000),
        layout=Conv5(),
        anchors=Anchors(sizes_px=((128, 256, 512),)),
        rpn=RPN(
            pre_nms_train=12000,
            pre_nms_test=6000,
            post_nms_train=2000,
            post_nms_test=300,
            box_loss=SmoothL1(),
        ),
        sampling=RoISampling(rois_per_image=128),
        roi=RoIPool(),
        box_head=VGGHead(),
        box_loss=SmoothL1(beta=1.0),
        mask=NoMask(),
    ),
    "r50-c4": _PAPER_C4,
    "r101-c4": _changed(_PAPER_C4, backbone=ResNet(depth=101)),
    "r50-c5": _changed(
        _PAPER_C4,
        layout=C5(),
        sampling=RoISampling(rois_per_image=512),
        box_head=FCHead(),
        mask=MaskBranch(head=FCNMask()),
    ),
    "r50-fpn": _PAPER_FPN,
    "r101-fpn": _changed(_PAPER_FPN, backbone=ResNet(depth=101)),
    "x101-64x4d-fpn": _changed(
        _PAPER_FPN, backbone=ResNeXt(), weights=TorchvisionWeights(name="IMAGENET1K_V1")
    ),
    # With plain L1, boxes gain and keypoints lose (detectron2's keypoint baselines, beta 0.5).
    "r50-fpn-keypoint": _changed(
        _PAPER_FPN,
        num_classes=1,
        mask=NoMask(),
        keypoints=_KEYPOINTS,
    ),
    # Detectron2's R50-FPN 1x from torchvision's weights: public 38.6 box AP, 35.2 mask AP.
    "r50-fpn-1x": _R50_FPN,
    "r50-fpn-torchvision": _R50_FPN_TORCHVISION,
    "r50-fpn-keypoint-torchvision": _changed(
        _R50_FPN_TORCHVISION,
        num_classes=1,
        mask=NoMask(),
        keypoints=KeypointBranch(half_pixel_px=0),
    ),
    "r50-fpn-detectron2": _changed(_R50_FPN, **_DETECTRON2, weights=_zoo("model_final_f10217.pkl")),
    "r50-fpn-keypoint-detectron2": _changed(
        _R50_FPN,
        **_DETECTRON2,
        num_classes=1,
        weights=_zoo("model_final_a6e10b.pkl"),
        rpn=RPN(post_nms_train=1500),
        box_loss=SmoothL1(beta=0.5),
        mask=NoMask(),
        keypoints=_KEYPOINTS,
    ),
    "r50-c4-detectron2": _changed(
        _C4,
        **_DETECTRON2,
        layout=C4(roi_side=14),
        weights=_zoo("model_final_4ce675.pkl"),
        rpn=RPN(pre_nms_train=12000, pre_nms_test=6000, post_nms_train=2000, post_nms_test=1000),
        sampling=RoISampling(rois_per_image=512),
    ),
    "tiny": ModelConfig(
        num_classes=4,
        backbone=ResNet(depth=18, norm=GroupNorm(groups=16), frozen_stages=0),
        weights=NoWeights(),
        image=ImageInput(short_side_px=128, max_side_px=128),
        layout=FPN(channels=64, strides=(8, 16), roi_strides=(16,)),
        anchors=Anchors(sizes_px=((16,), (32,), (64,), (128,))),
        rpn=RPN(
            batch_per_image=64,
            pre_nms_train=200,
            pre_nms_test=200,
            post_nms_train=100,
            post_nms_test=100,
        ),
        sampling=RoISampling(rois_per_image=64),
        box_head=FCHead(width=256),
        mask=MaskBranch(head=FCNMask(convs=2, width=64)),
    ),
}


def preset(name: str) -> ModelConfig:
    """The named architecture. Raises ValueError with the nearest name, or all that there are."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(PRESETS))}"
        raise ValueError(f"no model preset {name!r}; {hint}")
    return PRESETS[name]


# Detectron's defaults (SOLVER): biases train at twice the rate and do not decay, and the rate
# climbs from a third over 500 steps. The paper states none of this.
_PUBLISHED_OPTIMISER: dict[str, JsonValue] = {
    "kind": "sgd",
    "bias_lr_factor": 2.0,
    "bias_decay_factor": 0.0,
}
_PUBLISHED_SCHEDULE: dict[str, JsonValue] = {
    "kind": "step",
    "warmup_steps": 500,
    "warmup_factor": 1 / 3,
}
_PUBLISHED_RECIPE: dict[str, JsonValue] = {
    "optimiser": _PUBLISHED_OPTIMISER,
    "schedule": _PUBLISHED_SCHEDULE,
}

# Where a preset's recipe differs from the defaults in `contract.recipe`. Those are Mask R-CNN's
# (section 3.1): 160k steps of 16 images, rate 0.02, divided by 10 at 120k, weight decay 1e-4,
# momentum 0.9, images of 800 px. The precision is fp32 there and here; a study may say otherwise.
_RECIPES: dict[str, dict[str, JsonValue]] = {
    # Faster R-CNN (1506.01497), section 4.2: 240k steps at 0.003, 80k at 0.0003, 8 images, 600 px.
    "vgg16-faster-rcnn": {
        "data": {"short_sides_px": [600], "max_side_px": 1000},
        "optimiser": {"kind": "sgd", "lr": 0.003, "weight_decay": 5e-4, "norm_weight_decay": 0.0},
        "schedule": {"kind": "step", "drop_steps": [240_000]},
        "loop": {"steps": 320_000, "global_batch": 8, "best_metric": "bbox/AP"},
    },
    **dict.fromkeys(("r50-c4", "r101-c4", "r50-c5", "r50-fpn", "r101-fpn"), _PUBLISHED_RECIPE),
    # Table 2a: 8 images a step at half the rate, for as many steps.
    "x101-64x4d-fpn": {
        "optimiser": {**_PUBLISHED_OPTIMISER, "lr": 0.01},
        "schedule": _PUBLISHED_SCHEDULE,
        "loop": {"global_batch": 8},
    },
    "r50-fpn-1x": {
        "data": {"short_sides_px": [640, 672, 704, 736, 768, 800]},
        "schedule": {"kind": "step", "drop_steps": [60_000, 80_000]},
        "loop": {"steps": 90_000},
    },
    # Section 5: 90k steps, drops at 60k and 80k, short sides from [640, 800].
    "r50-fpn-keypoint": {
        "data": {
            "short_sides_px": [640, 672, 704, 736, 768, 800],
            "filter": {"categories": ["person"], "require_keypoints": True},
        },
        "optimiser": _PUBLISHED_OPTIMISER,
        "schedule": {**_PUBLISHED_SCHEDULE, "drop_steps": [60_000, 80_000]},
        "loop": {"steps": 90_000, "best_metric": "keypoints/AP"},
    },
    # CPU scale: 400 steps on 128 px.
    "tiny": {
        "data": {
            "short_sides_px": [128],
            "max_side_px": 128,
            "num_loader_workers": 0,
            "bucket_batches": 8,
        },
        "optimiser": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "one_cycle"},
        "loop": {
            "steps": 400,
            "global_batch": 8,
            "clip_grad_norm": 10.0,
            "checkpoint_every_steps": 100,
            "log_every_steps": 10,
        },
    },
}


def run_preset(name: str) -> dict[str, JsonValue]:
    """The preset's architecture with the paper's recipe, as data; it names no datasets."""
    return {
        "model": preset(name).model_dump(mode="json"),
        "data": {},
        **copied(_RECIPES.get(name, {})),
    }


def unstated(model: ModelConfig) -> tuple[str, ...]:
    """What the paper leaves open, or its released code does otherwise, and no field can say.

    One line each. The report repeats them beside the paper.
    """
    lines = ["boxes are x2 - x1 wide; Detectron's are a pixel wider, and its anchors are rounded"]
    match model.layout:
        case FPN():
            lines.append(
                f"training keeps {model.rpn.post_nms_train:,} proposals of each image; Detectron "
                "keeps 2,000 of the images of one GPU together"
            )
        case C5():
            lines.append(
                f"a 1 x 1 convolution takes res5 to {model.layout.channels} channels for the RPN "
                f"and the heads, and {model.sampling.rois_per_image} RoIs of an image train them; "
                "the paper states neither for C5"
            )
        case C4() | Conv5():
            pass
        case _:
            assert_never(model.layout)
    if isinstance(model.mask, MaskBranch):
        if isinstance(model.mask.head, MLPMask):
            cells = 7 if isinstance(model.layout, C4) else model.mask.head.input_side
            lines.append(f"the MLP of masks reads {cells} x {cells} cells; the paper has no number")
        if isinstance(model.mask.loss, SoftmaxMask):
            lines.append("the paper defines neither the targets nor the inference of softmax masks")
    return tuple(lines)
