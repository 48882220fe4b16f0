"""Torchvision's own detectors, with random weights and random norm statistics, against ours with
the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import (
    MaskRCNN_ResNet50_FPN_Weights,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
)
from torchvision.models.detection import roi_heads as their_roi_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.functional import pil_to_tensor

from contract.model import ModelConfig
from contract.presets import preset
from model.branches.mask import sample_crops
from model.build import build_detector
from model.weights import from_torchvision, load_initial
from tests.model.batches import shape_batch
from tests.model.branches.test_masks import COCO, needs_coco

SHORT_SIDE, LONG_SIDE, DETECTIONS = 128, 208, 8


def theirs(make: Callable[..., nn.Module]) -> Any:
    """A model far from initialisation: no norm is the identity, scores and offsets are spread out.

    Not so far that scores saturate: torchvision orders equal ones by an unstable sort.
    """
    torch.manual_seed(0)
    model = make(
        weights=None,
        weights_backbone=None,
        box_score_thresh=0.0,
        box_detections_per_img=DETECTIONS,
        min_size=SHORT_SIDE,
        max_size=LONG_SIDE,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.5)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 2
        model.rpn.head.cls_logits.weight *= 2
        model.rpn.head.bbox_pred.weight *= 5
    return model.eval()


def small(name: str) -> ModelConfig:
    cfg = preset(name)
    image = cfg.image.model_copy(update={"short_side_px": SHORT_SIDE, "max_side_px": LONG_SIDE})
    inference = cfg.inference.model_copy(
        update={"score_threshold": 0.0, "detections_per_image": DETECTIONS}
    )
    return cfg.model_copy(update={"image": image, "inference": inference})


def drawn() -> list[Tensor]:
    """Noise of three sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 200, 300), (3, 333, 250), (3, 100, 260))
    return [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes
    ]


def photographs() -> list[Tensor]:
    """Real images of three sizes."""
    paths = sorted((COCO / "val2017").glob("*.jpg"))[:12]
    images = [pil_to_tensor(Image.open(path).convert("RGB")) for path in paths]
    found = list({tuple(image.shape): image for image in images}.values())[:3]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("make", "name", "pictures"),
    [
        (maskrcnn_resnet50_fpn, "r50-fpn-torchvision", drawn),
        pytest.param(maskrcnn_resnet50_fpn, "r50-fpn-torchvision", photographs, marks=needs_coco),
        pytest.param(
            keypointrcnn_resnet50_fpn, "r50-fpn-keypoint-torchvision", drawn, marks=pytest.mark.slow
        ),
        pytest.param(
            keypointrcnn_resnet50_fpn, "r50-fpn-keypoint-torchvision", photographs, marks=needs_coco
        ),
    ],
)
def test_predictions_equal_torchvisions(make, name, pictures):
    their_model = theirs(make)
    detector = build_detector(small(name))
    detector.load_state_dict(from_torchvision(their_model.state_dict()), strict=True)
    for image in pictures():
        with torch.no_grad():
            expected = their_model([image.float() / 255])[0]
        found = detector.predict_image(image)
        assert len(expected["boxes"]) == DETECTIONS
        assert torch.equal(found["labels"], expected["labels"])
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-2)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)
        if "masks" in expected:
            torch.testing.assert_close(found["masks"], expected["masks"][:, 0], rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(found["keypoints"], expected["keypoints"], rtol=0, atol=1e-2)
            torch.testing.assert_close(
                found["keypoints_scores"], expected["keypoints_scores"], rtol=0, atol=1e-3
            )
    assert detector.training, "predicting leaves the mode as it was"


def test_losses_equal_torchvisions_on_the_same_samples(monkeypatch):
    """Torchvision gets our sampled anchors, RoIs and mask targets (its own targets are soft)."""
    their_model = theirs(maskrcnn_resnet50_fpn).train()
    for module in their_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    detector = build_detector(small("r50-fpn-torchvision"))
    detector.load_state_dict(from_torchvision(their_model.state_dict()), strict=True)
    batch = shape_batch(images=2, objects=3, side=128, num_classes=90, seed=4)
    ours = detector.losses(batch)
    step = detector._prepare(batch)
    monkeypatch.setattr(their_roi_heads, "project_masks_on_boxes", lambda *_: next(targets))
    monkeypatch.setattr(their_model.rpn, "fg_bg_sampler", lambda _: our_anchors(step))
    monkeypatch.setattr(
        their_model.roi_heads, "select_training_samples", lambda *_: our_rois(their_model, step)
    )
    targets = iter(our_mask_targets(step))
    objects = [
        {
            "boxes": boxes,
            "labels": labels + 1,
            "masks": torch.zeros(len(labels), 128, 128, dtype=torch.uint8),
        }
        for boxes, labels in zip(batch.boxes_xyxy, batch.labels, strict=True)
    ]
    images = ImageList(detector.normalise(batch.images), [(128, 128)] * 2)
    maps = their_model.backbone(images.tensors)
    _, rpn = their_model.rpn(images, maps, objects)
    _, heads = their_model.roi_heads(maps, [None, None], images.image_sizes, objects)
    pairs = {
        "rpn_objectness": rpn["loss_objectness"],
        "rpn_box": rpn["loss_rpn_box_reg"],
        "box_class": heads["loss_classifier"],
        "box_regression": heads["loss_box_reg"],
        "mask": heads["loss_mask"],
    }
    assert float(ours["mask"].count) > 2
    for name, expected in pairs.items():
        torch.testing.assert_close(ours[name].sum / ours[name].count, expected, rtol=0, atol=1e-4)


def our_anchors(step: Any) -> tuple[list[Tensor], list[Tensor]]:
    chosen, anchors = step.rpn_targets.sample, sum(len(level) for level in step.outputs.anchors)
    positive, negative = torch.zeros(2, 2, anchors, dtype=torch.uint8)
    for image in range(2):
        positive[image, chosen.index[image][chosen.positive[image]]] = 1
        negative[image, chosen.index[image][chosen.valid[image] & ~chosen.positive[image]]] = 1
    return list(positive), list(negative)


def our_rois(
    their_model: Any, step: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    s, batch = step.samples, step.batch
    kept = [s.valid[i] for i in range(2)]
    rois = [s.rois_xyxy[i, kept[i]] for i in range(2)]
    objects = [s.objects[i, kept[i]] for i in range(2)]
    labels = [(s.labels[i, kept[i]] + 1) % 91 for i in range(2)]
    matched = [batch.boxes_xyxy[i, objects[i]] for i in range(2)]
    return rois, objects, labels, list(their_model.roi_heads.box_coder.encode(matched, rois))


def our_mask_targets(step: Any) -> list[Tensor]:
    rois, batch = step.positives, step.batch
    boxes, crops = (
        batch.boxes_xyxy[rois.image, rois.objects],
        batch.mask_crops[rois.image, rois.objects],
    )
    inside = sample_crops(crops, boxes, rois.boxes_xyxy, 28).float()
    return [inside[rois.image == image] for image in range(2)]


def test_keypoint_loss_equals_torchvisions():
    cfg = preset("r50-fpn-keypoint-torchvision")
    branch = build_detector(cfg.model_copy(update={"num_classes": 1})).keypoints
    assert branch is not None
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(6, 2, generator=generator) * 50
    boxes = torch.cat([start, start + 20 + torch.rand(6, 2, generator=generator) * 40], dim=1)
    points = torch.rand(6, 17, 2, generator=generator) * 110
    visible = torch.randint(0, 3, (6, 17, 1), generator=generator).float()
    keypoints = torch.cat([points, visible], dim=2)
    keypoints[:, 0, :2] = boxes[:, 2:]  # on the lower right corner: the last cell
    logits = torch.randn(6, 17, 56, 56, generator=generator)
    index = torch.arange(6)
    rois = SimpleNamespace(image=index * 0, objects=index, boxes_xyxy=boxes, weight=torch.ones(6))
    expected = their_roi_heads.keypointrcnn_loss(logits, [boxes], [keypoints], [index])
    ours = branch.loss(logits, rois, keypoints[None]) / branch.count(rois, keypoints[None])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_released_files_older_names_load_too():
    """Files from before torchvision 0.13 have other names for pyramid, RPN and mask head."""
    state = theirs(maskrcnn_resnet50_fpn).state_dict()
    old = {}
    for name, value in state.items():
        name = name.replace("inner_blocks.0.0", "inner_blocks.0").replace(
            "rpn.head.conv.0.0", "rpn.head.conv"
        )
        for i in range(4):
            name = name.replace(f"blocks.{i}.0.", f"blocks.{i}.")
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        if not name.endswith("num_batches_tracked"):
            old[name] = value
    assert "roi_heads.mask_head.mask_fcn1.weight" in old
    assert "backbone.fpn.inner_blocks.3.weight" in old
    new = from_torchvision(state)
    assert from_torchvision(old).keys() == new.keys()
    with pytest.raises(ValueError, match="unknown tensor 'extra'"):
        from_torchvision({**state, "extra": torch.zeros(1)})


def test_the_released_classes_fit_packed_coco():
    """The file has a class for each of COCO's ids; data have the 80 that COCO uses."""
    theirs_90 = theirs(maskrcnn_resnet50_fpn).state_dict()
    cfg = small("r50-fpn-torchvision")
    all_90, used = build_detector(cfg), build_detector(cfg.model_copy(update={"num_classes": 80}))
    load_initial(all_90, theirs_90, "torchvision")
    load_initial(used, theirs_90, "torchvision")
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [i for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    features = torch.randn(3, 256, 7, 7, generator=torch.Generator().manual_seed(0))
    keys = torch.zeros(3, dtype=torch.long)
    (logits, offsets), (few, few_offsets) = all_90.box(features, keys), used.box(features, keys)
    torch.testing.assert_close(few, logits[:, [0, *ids]])
    torch.testing.assert_close(few_offsets, offsets[:, [i - 1 for i in ids]])
    crops = torch.randn(2, 256, 14, 14, generator=torch.Generator().manual_seed(1))
    masks, few_masks = all_90.mask.head(crops), used.mask.head(crops)
    torch.testing.assert_close(few_masks, masks[:, [i - 1 for i in ids]])


def test_the_presets_differ_where_they_should():
    tv, own = preset("r50-fpn-torchvision"), preset("r50-fpn-1x")
    assert tv.anchors.rounded
    assert tv.background == "first"
    assert not tv.roi.aligned
    assert own.roi.aligned
