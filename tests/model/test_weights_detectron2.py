"""Weights of detectron2's model zoo, by a second reading of its names and conventions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from contract.presets import preset
from model.build import build_detector
from model.detector import Detector
from model.weights import from_detectron2, load_initial

BLOCKS = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}


class Zoo:
    """A state dict with the model zoo's names and random values, and what its layers do by those
    names.
    """

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.state: dict[str, Any] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        norm: bool = False,
        bias: bool = True,
        gain: float = 2.0,
    ) -> None:
        fan_in = shape[0] if "deconv" in name or "lowres" in name else int(np.prod(shape[1:]))
        self.state[f"{name}.weight"] = self.normal(shape, (gain / fan_in) ** 0.5)
        channels = shape[1] if "deconv" in name or "lowres" in name else shape[0]
        if norm:
            for part, low, high in (
                ("weight", 0.7, 1.0),
                ("bias", -0.1, 0.1),
                ("running_mean", -0.1, 0.1),
            ):
                self.state[f"{name}.norm.{part}"] = self.random.uniform(low, high, channels).astype(
                    np.float32
                )
            self.state[f"{name}.norm.running_var"] = self.random.uniform(0.8, 1.5, channels).astype(
                np.float32
            )
        elif bias:
            self.state[f"{name}.bias"] = self.normal((channels,), 0.1)

    def normal(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32) * np.float32(deviation)

    def add_resnet(self, prefix: str, stages: tuple[str, ...], head: str = "") -> None:
        self.add(f"{prefix}stem.conv1", (64, 3, 7, 7), norm=True, gain=1e-4)  # pixels up to 255
        for stage in stages:
            self.add_stage(f"{prefix}{stage}", stage)
        if head:
            self.add_stage(f"{head}res5", "res5")

    def add_stage(self, name: str, stage: str) -> None:
        middle = 64 << (int(stage[3:]) - 2)
        entering = 64 if stage == "res2" else 2 * middle
        for block in range(BLOCKS[stage]):
            if block == 0:
                self.add(f"{name}.0.shortcut", (4 * middle, entering, 1, 1), norm=True, gain=1)
            self.add(f"{name}.{block}.conv1", (middle, entering, 1, 1), norm=True)
            self.add(f"{name}.{block}.conv2", (middle, middle, 3, 3), norm=True)
            self.add(f"{name}.{block}.conv3", (4 * middle, middle, 1, 1), norm=True, gain=0.3)
            entering = 4 * middle

    def add_rpn(self, channels: int, per_cell: int) -> None:
        self.state["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros(
            (per_cell, 4), np.float32
        )
        self.add("proposal_generator.rpn_head.conv", (channels, channels, 3, 3))
        self.add("proposal_generator.rpn_head.objectness_logits", (per_cell, channels, 1, 1))
        self.add(
            "proposal_generator.rpn_head.anchor_deltas", (4 * per_cell, channels, 1, 1), gain=0.02
        )

    def add_box_predictor(self, width: int, classes: int) -> None:
        self.add("roi_heads.box_predictor.cls_score", (classes + 1, width))
        self.add("roi_heads.box_predictor.bbox_pred", (4 * classes, width), gain=0.1)

    def add_fpn(self) -> None:
        self.add_resnet("backbone.bottom_up.", tuple(BLOCKS))
        for level in range(2, 6):
            self.add(f"backbone.fpn_lateral{level}", (256, 64 << level, 1, 1), gain=1)
            self.add(f"backbone.fpn_output{level}", (256, 256, 3, 3), gain=1)
        self.add_rpn(256, 3)
        self.add("roi_heads.box_head.fc1", (1024, 256 * 49))
        self.add("roi_heads.box_head.fc2", (1024, 1024))

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        s = {
            part: torch.from_numpy(value)
            for part, value in self.state.items()
            if part.startswith(f"{name}.")
        }
        x = F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding)
        if f"{name}.norm.weight" in s:
            norm = (
                s[f"{name}.norm.{part}"]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, *norm, training=False, eps=1e-5)
        return x

    def stage(self, name: str, x: Tensor, stride: int) -> Tensor:
        """Bottlenecks whose first halves the map in its first 1 x 1, as Caffe's."""
        block = 0
        while f"{name}.{block}.conv1.weight" in self.state:
            step = stride if block == 0 else 1
            hidden = F.relu(self.conv(f"{name}.{block}.conv1", x, step))
            hidden = F.relu(self.conv(f"{name}.{block}.conv2", hidden, padding=1))
            hidden = self.conv(f"{name}.{block}.conv3", hidden)
            x = F.relu(hidden + (self.conv(f"{name}.0.shortcut", x, step) if block == 0 else x))
            block += 1
        return x

    def resnet(self, prefix: str, image: Tensor, stages: tuple[str, ...]) -> list[Tensor]:
        """An RGB image in 0 to 255 (1, 3, H, W) to the maps of `stages`."""
        bgr = image.float().flip(1) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
        x = F.max_pool2d(F.relu(self.conv(f"{prefix}stem.conv1", bgr, 2, 3)), 3, 2, 1)
        maps = []
        for stage in stages:
            x = self.stage(f"{prefix}{stage}", x, 1 if stage == "res2" else 2)
            maps.append(x)
        return maps

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        above, levels = None, []
        for level in (5, 4, 3, 2):
            x = self.conv(f"backbone.fpn_lateral{level}", maps[level - 2])
            above = x if above is None else x + F.interpolate(above, scale_factor=2, mode="nearest")
            levels.insert(0, self.conv(f"backbone.fpn_output{level}", above, padding=1))
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]

    def rpn(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (1, N) and offsets (1, N, 4) of a map, anchors of a cell side by side."""
        hidden = F.relu(self.conv("proposal_generator.rpn_head.conv", features, padding=1))
        logits = (
            self.conv("proposal_generator.rpn_head.objectness_logits", hidden)
            .permute(0, 2, 3, 1)
            .flatten(1)
        )
        offsets = self.conv("proposal_generator.rpn_head.anchor_deltas", hidden)
        return logits, offsets.view(1, -1, 4, *offsets.shape[2:]).permute(0, 3, 4, 1, 2).reshape(
            1, -1, 4
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(
            x, *(torch.from_numpy(self.state[f"{name}.{part}"]) for part in ("weight", "bias"))
        )

    def up(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        weight, bias = (
            torch.from_numpy(self.state[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=padding)


def loaded(zoo: Zoo, name: str) -> Detector:
    detector = build_detector(preset(name)).eval()
    load_initial(detector, zoo.state, "detectron2")
    return detector


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_model_zoos_mask_rcnn_with_fpn_loads_with_its_conventions():
    zoo = Zoo()
    zoo.add_fpn()
    zoo.add_box_predictor(1024, 80)
    for i in range(1, 5):
        zoo.add(f"roi_heads.mask_head.mask_fcn{i}", (256, 256, 3, 3))
    zoo.add("roi_heads.mask_head.deconv", (256, 256, 2, 2))
    zoo.add("roi_heads.mask_head.predictor", (80, 256, 1, 1))
    zoo.state["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
    detector = loaded(zoo, "r50-fpn-detectron2")
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    levels = zoo.pyramid(zoo.resnet("backbone.bottom_up.", image, tuple(BLOCKS)))
    maps, outputs = detector._read(detector.normalise(image))
    for level, expected in enumerate(levels):
        close(maps.rpn[level], expected)
        logits, offsets = zoo.rpn(expected)
        close(outputs.logits[level], logits)
        close(outputs.offsets[level], offsets)
    crops = torch.randn(3, 256, 7, 7)
    hidden = F.relu(
        zoo.linear(
            "roi_heads.box_head.fc2", F.relu(zoo.linear("roi_heads.box_head.fc1", crops.flatten(1)))
        )
    )
    logits, offsets = detector.box(crops, torch.zeros(3, dtype=torch.int64))
    close(
        detector.box.scores(logits),
        zoo.linear("roi_heads.box_predictor.cls_score", hidden).softmax(1)[:, :80],
    )
    close(offsets, zoo.linear("roi_heads.box_predictor.bbox_pred", hidden).view(3, 80, 4))
    x = features = torch.randn(2, 256, 14, 14)
    for i in range(1, 5):
        x = F.relu(zoo.conv(f"roi_heads.mask_head.mask_fcn{i}", x, padding=1))
    x = zoo.conv("roi_heads.mask_head.predictor", F.relu(zoo.up("roi_heads.mask_head.deconv", x)))
    masks = detector.mask.probabilities(features, torch.tensor([79, 5]))["sigmoid"]
    close(masks, x[torch.arange(2), [79, 5]].sigmoid())


@torch.no_grad()
def test_the_model_zoos_keypoint_rcnn_loads():
    zoo = Zoo()
    zoo.add_fpn()
    zoo.add_box_predictor(1024, 1)
    for i in range(1, 9):
        zoo.add(f"roi_heads.keypoint_head.conv_fcn{i}", (512, 256 if i == 1 else 512, 3, 3))
    zoo.add("roi_heads.keypoint_head.score_lowres", (512, 17, 4, 4))
    detector = loaded(zoo, "r50-fpn-keypoint-detectron2")
    x = features = torch.randn(2, 256, 14, 14)
    for i in range(1, 9):
        x = F.relu(zoo.conv(f"roi_heads.keypoint_head.conv_fcn{i}", x, padding=1))
    x = zoo.up("roi_heads.keypoint_head.score_lowres", x, padding=1)
    close(
        detector.keypoints(features),
        F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    )


@torch.no_grad()
def test_the_model_zoos_c4_crops_14_x_14_and_lets_res5_halve_it():
    zoo = Zoo()
    zoo.add_resnet("backbone.", ("res2", "res3", "res4"), head="roi_heads.")
    zoo.add_rpn(1024, 15)
    zoo.add_box_predictor(2048, 80)
    zoo.add("roi_heads.mask_head.deconv", (2048, 256, 2, 2))
    zoo.add("roi_heads.mask_head.predictor", (80, 256, 1, 1))
    detector = loaded(zoo, "r50-c4-detectron2")
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    res4 = zoo.resnet("backbone.", image, ("res2", "res3", "res4"))[-1]
    maps, outputs = detector._read(detector.normalise(image))
    close(maps.roi[0], res4)
    close(outputs.logits[0], zoo.rpn(res4)[0])
    rois = torch.tensor([[0.0, 3.0, 5.0, 60.0, 50.0], [0.0, 10.0, 2.0, 90.0, 60.0]])
    crops = torchvision.ops.roi_align(res4, rois, 14, 1 / 16, sampling_ratio=0, aligned=True)
    features = zoo.stage("roi_heads.res5", crops, 2)
    assert features.shape == (2, 2048, 7, 7)
    close(detector.crops.for_boxes(maps.roi, rois), features)
    masks = zoo.conv(
        "roi_heads.mask_head.predictor", F.relu(zoo.up("roi_heads.mask_head.deconv", features))
    )
    assert masks.shape == (2, 80, 14, 14)
    close(
        detector.mask.probabilities(features, torch.tensor([3, 7]))["sigmoid"],
        masks[[0, 1], [3, 7]].sigmoid(),
    )
    paper = build_detector(preset("r50-c4")).eval()
    assert paper.crops.crop.side == 7, "the paper's arm is another one, by its own preset"
    assert paper.crops.res5[0].downsample[0].stride == (1, 1)


def test_a_zoo_file_of_another_layout_gives_one_clear_line():
    zoo = Zoo()
    zoo.add_resnet("backbone.", ("res2", "res3", "res4"), head="roi_heads.")
    detector = build_detector(preset("r50-fpn-detectron2"))
    with pytest.raises(
        ValueError, match=r"^weights in layout .*lacks 'backbone\.layer4.*check that backbone"
    ):
        load_initial(detector, zoo.state, "detectron2")
    with pytest.raises(ValueError, match=re.escape("unknown tensor 'conv1_w'")):
        from_detectron2({"conv1_w": np.zeros(1)})
