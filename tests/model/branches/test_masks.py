"""Mask targets, losses, inferences and pasting; some tests read the instances of real COCO."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle_tools
from torch import Tensor

from contract.model import SoftmaxMask
from model.branches.mask import (
    FCNHead,
    MaskBranch,
    MLPHead,
    SigmoidMasks,
    SoftmaxMasks,
    sample_crops,
)
from model.branches.paste import paste_all, paste_all_torchvision, paste_mask
from model.losses import sigmoid_mask_loss, softmax_mask_loss
from model.roi.samples import FlatRoIs

ROOT = Path(__file__).resolve().parents[3]
COCO = Path(os.environ.get("MASKRAY_COCO_MINI", ROOT.parent / "shared" / "data" / "coco-mini"))
TRAIN = COCO / "annotations" / "instances_train2017.json"
CROP_SIDE, SIDE = 112, 28
needs_coco = pytest.mark.skipif(
    not TRAIN.exists(), reason=f"no COCO sample at {COCO}; set MASKRAY_COCO_MINI"
)


def polygons() -> list[list[Any]]:
    found = json.loads(TRAIN.read_text())["annotations"]
    return [
        a["segmentation"]
        for a in found
        if isinstance(a["segmentation"], list) and min(a["bbox"][2:]) >= 1
    ]


def rasterised(
    parts: list[list[float]], box: tuple[float, float, float, float], side: int
) -> np.ndarray:
    """The polygon scaled so that `box` becomes side x side pixels, by pycocotools."""
    x0, y0, x1, y1 = box
    scale = np.array([side / (x1 - x0), side / (y1 - y0)])
    moved = [((np.array(p).reshape(-1, 2) - [x0, y0]) * scale).ravel().tolist() for p in parts]
    return rle_tools.decode(rle_tools.merge(rle_tools.frPyObjects(moved, side, side))).astype(bool)


def bounds(parts: list[list[float]]) -> tuple[float, float, float, float]:
    points = np.concatenate([np.array(p).reshape(-1, 2) for p in parts])
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


@needs_coco
def test_targets_agree_with_polygons_cropped_by_pycocotools():
    """Over the object's own box and over a RoI that misses it as proposals do."""
    generator = np.random.default_rng(0)
    exact, shifted = [], []
    for parts in polygons():
        box = bounds(parts)
        if min(box[2] - box[0], box[3] - box[1]) < 1:
            continue
        crop = torch.from_numpy(rasterised(parts, box, CROP_SIDE).astype(np.uint8))[None]
        sides = np.array([box[2] - box[0], box[3] - box[1]])
        move = generator.uniform(-0.1, 0.1, 4) * np.tile(sides, 2)
        for roi, results in ((box, exact), (tuple((np.array(box) + move).tolist()), shifted)):
            target = sample_crops(crop, torch.tensor([box]), torch.tensor([roi]), SIDE)[0].numpy()
            results.append(overlap(target, rasterised(parts, roi, SIDE)))
    assert len(exact) > 500
    assert np.mean(exact) > 0.97
    assert np.mean(shifted) > 0.97


@needs_coco
def test_cropping_and_pasting_gives_the_object_back():
    image_sizes = {
        i["id"]: (i["height"], i["width"]) for i in json.loads(TRAIN.read_text())["images"]
    }
    found = json.loads(TRAIN.read_text())["annotations"]
    results = []
    for annotation in found[::3]:
        parts = annotation["segmentation"]
        if not isinstance(parts, list) or min(annotation["bbox"][2:]) < 1:
            continue
        height, width = image_sizes[annotation["image_id"]]
        whole = rle_tools.decode(
            rle_tools.merge(rle_tools.frPyObjects(parts, height, width))
        ).astype(bool)
        box = bounds(parts)
        soft = torch.from_numpy(rasterised(parts, box, SIDE).astype(np.float32))
        crop, top, left = paste_mask(soft, torch.tensor(box), height, width)
        pasted = np.zeros((height, width), bool)
        pasted[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.numpy().astype(bool)
        results.append(overlap(pasted, whole))
    assert len(results) > 150
    assert np.mean(results) > 0.94


def test_a_target_is_sampled_at_the_centres_of_the_rois_cells():
    crop = torch.zeros(1, 4, 4, dtype=torch.uint8)
    crop[0, :, 2:] = 1  # the right half of the box
    box = torch.tensor([[10.0, 10.0, 18.0, 18.0]])
    assert sample_crops(crop, box, box, 4)[0].tolist() == [[False, False, True, True]] * 4
    beside = torch.tensor([[14.0, 6.0, 22.0, 14.0]])  # right part and lower part of it off the box
    expected = [[False] * 4, [False] * 4, [True, True, False, False], [True, True, False, False]]
    assert sample_crops(crop, box, beside, 4)[0].tolist() == expected


def test_an_untrained_head_costs_ln_2_and_ln_81():
    weight = torch.ones(3)
    sigmoid = sigmoid_mask_loss(torch.zeros(3, 28, 28), torch.rand(3, 28, 28).round(), weight) / 3
    softmax = (
        softmax_mask_loss(torch.zeros(3, 81, 28, 28), torch.randint(0, 81, (3, 28, 28)), weight) / 3
    )
    torch.testing.assert_close(sigmoid, torch.tensor(math.log(2)))
    torch.testing.assert_close(softmax, torch.tensor(math.log(81)))


def test_softmax_loss_equals_a_loop_over_pixels():
    logits, target = torch.randn(3, 5, 4, 4), torch.randint(0, 5, (3, 4, 4))
    weight = torch.tensor([1.0, 0.0, 1.0])
    expected = 0.0
    for r in (0, 2):
        for i in range(4):
            for j in range(4):
                p = torch.exp(logits[r, :, i, j])
                expected -= math.log(float(p[target[r, i, j]] / p.sum())) / 16
    assert math.isclose(float(softmax_mask_loss(logits, target, weight)), expected, rel_tol=1e-5)


def two_objects() -> tuple[FlatRoIs, Tensor, Tensor, Tensor]:
    """A RoI over object 0 (class 1, left half); object 1 (class 3) covers its right half."""
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [4.0, 0.0, 12.0, 8.0]]])
    crops = torch.ones(1, 2, 8, 8, dtype=torch.uint8)
    crops[0, 0, :, 4:] = 0
    zero = torch.zeros(1, dtype=torch.int64)
    rois = FlatRoIs(zero, zero, boxes[0, :1], torch.tensor([1]), zero, zero, torch.ones(1))
    return rois, boxes, crops, torch.tensor([[1, 3]])


@pytest.mark.parametrize(("others_own_class", "right"), [(False, 5), (True, 3)])
def test_other_objects_are_background_or_their_own_class(others_own_class, right):
    rois, boxes, crops, labels = two_objects()
    target = SoftmaxMasks(others_own_class, "argmax").targets(
        torch.Size((1, 6, 4, 4)), rois, boxes, crops, labels
    )
    assert target[0].tolist() == [[1, 1, right, right]] * 4


@pytest.mark.parametrize("first", SoftmaxMask.inferences)
def test_softmax_inferences_decide_as_their_names_say(first):
    logits, labels = torch.randn(6, 5, 8, 8) * 2, torch.randint(0, 4, (6,))
    maps = SoftmaxMasks(False, first).probabilities(logits, labels)
    assert next(iter(maps)) == first
    assert set(maps) == set(SoftmaxMask.inferences)
    p = logits.softmax(dim=1)
    own = p[torch.arange(6), labels]
    torch.testing.assert_close(maps["probability"], own)
    assert torch.equal(maps["argmax"] > 0.5, p.argmax(dim=1) == labels[:, None, None])
    torch.testing.assert_close(maps["versus_background"], own / (own + p[:, 4]))


@pytest.mark.parametrize(
    "head", [FCNHead(6, 1, 8, 4), MLPHead(6 * 49, 2, 8, 4, 14)], ids=["fcn", "mlp"]
)
def test_sigmoid_masks_compute_the_own_class_or_the_only_one(head):
    features, labels = torch.randn(3, 6, 7, 7), torch.tensor([2, 0, 3])
    every = head(features)
    assert every.shape == (3, 4, 14, 14)
    own = MaskBranch(head, SigmoidMasks(4, False), 14, 1.0).probabilities(features, labels)[
        "sigmoid"
    ]
    torch.testing.assert_close(own, every[torch.arange(3), labels].sigmoid())
    only = MaskBranch(head, SigmoidMasks(4, True), 14, 1.0).probabilities(features, labels)[
        "sigmoid"
    ]
    torch.testing.assert_close(only, every[:, 0].sigmoid())


def test_pasting_a_full_mask_covers_the_pixels_with_centres_inside():
    crop, top, left = paste_mask(torch.ones(4, 4), torch.tensor([2.4, 3.6, 6.6, 5.4]), 10, 10)
    assert (top, left) == (4, 2)
    assert crop.tolist() == [[1, 1, 1, 1, 1]]  # rows 4, columns 2 to 6


def test_pasting_equals_sampling_the_map_at_pixel_centres():
    mask, box = torch.rand(14, 14), torch.tensor([3.2, 5.7, 40.1, 30.3])
    pasted = paste_all(mask[None], box[None], 50, 60)[0]
    y, x = torch.meshgrid(torch.arange(50) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    grid = (
        torch.stack([(x - box[0]) / (box[2] - box[0]), (y - box[1]) / (box[3] - box[1])], dim=-1)
        * 2
        - 1
    )
    sampled = F.grid_sample(
        mask[None, None], grid[None], padding_mode="border", align_corners=False
    )[0, 0]
    inside = (grid.abs() < 1).all(dim=-1)
    torch.testing.assert_close(pasted, sampled * inside, rtol=1e-4, atol=1e-4)


def test_pasting_off_the_image_gives_an_empty_crop():
    crop, _, _ = paste_mask(torch.ones(4, 4), torch.tensor([-20.0, 5.0, -10.0, 9.0]), 10, 10)
    assert crop.numel() == 0


def test_torchvisions_pasting_is_torchvisions():
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    masks = torch.rand(5, 28, 28)
    start = torch.rand(5, 2) * 60 - 10
    # Every box reaches into the image: torchvision fails on one that lies outside.
    boxes = torch.cat([start, start + 11 + torch.rand(5, 2) * 50], dim=1)
    theirs = paste_masks_in_image(masks[:, None], boxes, (70, 80))[:, 0]
    assert torch.equal(paste_all_torchvision(masks, boxes, 70, 80), theirs)
