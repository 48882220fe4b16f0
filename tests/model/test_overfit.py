"""Every arm learns eight drawn images by heart: what trains also predicts, in the same pixels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_tools
from torch import Tensor

from contract.model import MaskLoss, ModelConfig, RoIOp
from model.build import build_detector
from model.structures import Batch
from pipelines.evaluate.evaluation import evaluate
from tests.model.arms import arms
from tests.model.batches import covered, shape_batch
from tests.model.test_detector import total
from workers.training.results import coco_results

IMAGES, OBJECTS, CLASSES, POINTS = 8, 2, 3, 17
RATE, STEPS, MANY_STEPS = 1e-3, 60, 120
SIDES = {"fpn": 48, "c4": 64, "c4-14": 64, "c5": 160, "conv5": 96}  # of the images, by layout
GN = {"kind": "gn", "groups": 16}
RESNET = {"kind": "resnet", "depth": 18, "norm": GN, "frozen_stages": 0}
VGG = {"kind": "vgg16", "frozen_stages": 0}
COMMON: dict[str, Any] = {
    "num_classes": CLASSES,
    "backbone": RESNET,
    "weights": {"kind": "none"},
    "rpn": {
        "batch_per_image": 32,
        "pre_nms_train": 100,
        "pre_nms_test": 50,
        "post_nms_train": 50,
        "post_nms_test": 30,
    },
    "sampling": {"rois_per_image": 24},
    "box_head": {"kind": "fc", "width": 128},
}
SMALL_FCN: dict[str, Any] = {"kind": "fcn", "convs": 2, "width": 32}
FPN: dict[str, Any] = {
    "layout": {"kind": "fpn", "channels": 32, "strides": [4, 8, 16], "roi_strides": [4, 8]},
    "anchors": {"sizes_px": [[12], [18], [27]]},
    "mask": {"kind": "mask", "head": SMALL_FCN},
}
ONE_LEVEL: dict[str, Any] = {
    "anchors": {"sizes_px": [[18, 32]]},
    "mask": {"kind": "mask", "head": SMALL_FCN},
    "rpn": {
        **COMMON["rpn"],
        "post_nms_train": 8,
        "post_nms_test": 8,
    },  # few, so that a few RoIs teach all that is met
}
C4 = {
    **ONE_LEVEL,
    "sampling": {"rois_per_image": 4, "positive_fraction": 0.5},  # res5 runs on each
    "layout": {"kind": "c4"},
    "box_head": {"kind": "res5"},
    "mask": {"kind": "mask", "head": {**SMALL_FCN, "convs": 0}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fpn": FPN,
    "c4": C4,
    "c4-14": {**C4, "layout": {"kind": "c4", "roi_side": 14}},
    "c5": {
        **ONE_LEVEL,
        "layout": {"kind": "c5", "channels": 64},
        "anchors": {"sizes_px": [[48, 72]]},
    },
    "conv5": {
        **ONE_LEVEL,
        "layout": {"kind": "conv5"},
        "backbone": VGG,
        "roi": {"kind": "pool"},
        "anchors": {"sizes_px": [[29, 43]]},
    },
}
KEYPOINTS = {"kind": "keypoints", "num_keypoints": POINTS, "convs": 2, "width": 32}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name: layout and what differs from it
    **{layout: (layout, {}) for layout in LAYOUTS},
    **{f"{layout}-pool": (layout, {"roi": {"kind": "pool"}}) for layout in ("c4", "c5")},
    **{f"fpn-{parameter.id}": ("fpn", {"roi": parameter.values[0]}) for parameter in arms(RoIOp)},
    "fpn-align-adaptive": ("fpn", {"roi": {"kind": "align", "samples": 0}}),
    **{
        f"fpn-mask-{parameter.id}": ("fpn", {"mask": {"loss": parameter.values[0]}})
        for parameter in arms(MaskLoss)
    },
    "fpn-mlp-2": ("fpn", {"mask": {"head": {"kind": "mlp", "layers": 2, "width": 128}}}),
    "fpn-mlp-3-softmax": (
        "fpn",
        {"mask": {"head": {"kind": "mlp", "layers": 3, "width": 128}, "loss": {"kind": "softmax"}}},
    ),
    "fpn-agnostic-boxes": (
        "fpn",
        {"class_agnostic_boxes": True, "background": "first", "box_loss": {"kind": "smooth_l1"}},
    ),
    "fpn-boxes": ("fpn", {"mask": {"kind": "none"}}),
    "c4-boxes": ("c4", {"mask": {"kind": "none"}}),
    "fpn-keypoints": ("fpn", {"mask": {"kind": "none"}, "keypoints": KEYPOINTS}),
    "fpn-masks-keypoints": ("fpn", {"keypoints": KEYPOINTS}),
    "r34-bn": ("fpn", {"backbone": {**RESNET, "depth": 34, "norm": {"kind": "bn"}}}),
    "r50-1x1": ("fpn", {"backbone": {**RESNET, "depth": 50, "stride_in_1x1": True}}),
    "x50": (
        "fpn",
        {"backbone": {"kind": "resnext", "variant": "50-32x4d", "norm": GN, "frozen_stages": 0}},
    ),
}
SAMPLE = ("fpn",)  # of the arms, in the normal suite


def arm(name: str) -> ModelConfig:
    layout, changes = ARMS[name]
    fields = {**COMMON, **LAYOUTS[layout], **changes}
    if "mask" in changes:
        fields["mask"] = {**LAYOUTS[layout]["mask"], **changes["mask"]}
    if fields["mask"]["kind"] == "none":
        fields["mask"] = {"kind": "none"}
    return ModelConfig.model_validate(fields)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow, id=name)
        for name in ARMS
    ],
)
def test_every_arm_learns_eight_images_by_heart(name, tmp_path):
    layout, _ = ARMS[name]
    cfg = arm(name)
    batch = with_points(shape_batch(IMAGES, OBJECTS, SIDES[layout], CLASSES, POINTS, apart=True))
    detector = build_detector(cfg)
    train(detector, batch, num_steps(name))
    results = coco_results(cfg, detector.predict(batch), list(range(1, CLASSES + 1)))
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(as_coco(batch)))
    found = {
        kind: evaluate(truth, r, "segm" if kind.startswith("segm") else kind)
        for kind, r in results.items()
    }
    scores = {kind: evaluation.stats["AP50"] for kind, evaluation in found.items()}
    assert all(score > 0.9 for score in scores.values()), scores


def num_steps(name: str) -> int:
    """Coarse maps learn slowly, most of all without norms; so do masks with many channels."""
    if name == "conv5":
        return 2 * MANY_STEPS
    return MANY_STEPS if not name.startswith("fpn") or "mask-" in name or "mlp" in name else STEPS


def train(detector: torch.nn.Module, batch: Batch, steps: int) -> None:
    """Adam over a half cosine."""
    optimiser = torch.optim.AdamW(detector.parameters(), lr=RATE, fused=True)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = (
            RATE * min(1, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        fresh = replace(batch, noise_keys=batch.noise_keys + step)
        total(detector.losses(fresh)).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimiser.step()
        optimiser.zero_grad()


def with_points(batch: Batch) -> Batch:
    """Every object's keypoints at fixed places of its box."""
    angle = torch.arange(POINTS) * (2 * math.pi / POINTS)
    unit = 0.5 + 0.35 * torch.stack([angle.cos(), angle.sin()], dim=1)
    start, end = batch.boxes_xyxy[:, :, None, :2], batch.boxes_xyxy[:, :, None, 2:]
    xy = start + unit * (end - start)
    return replace(batch, keypoints=torch.cat([xy, torch.full_like(xy[..., :1], 2.0)], dim=-1))


def as_coco(batch: Batch) -> dict[str, Any]:
    side = batch.images.shape[-1]
    annotations = [
        annotation(batch, image, slot, side)
        for image in range(len(batch))
        for slot in range(batch.valid.shape[1])
    ]
    return {
        "images": [{"id": image, "height": side, "width": side} for image in range(len(batch))],
        "annotations": [{"id": number + 1, **a} for number, a in enumerate(annotations)],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)],
    }


def annotation(batch: Batch, image: int, slot: int, side: int) -> dict[str, Any]:
    box, label = batch.boxes_xyxy[image, slot], int(batch.labels[image, slot])
    mask = covered(box, label, side).numpy()
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    points: Tensor = batch.keypoints[image, slot] - torch.tensor([0.5, 0.5, 0.0])
    x0, y0, x1, y1 = box.tolist()
    return {
        "image_id": image,
        "category_id": label + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [side, side], "counts": rle["counts"].decode()},
        "keypoints": points.flatten().tolist(),
        "num_keypoints": POINTS,
    }
