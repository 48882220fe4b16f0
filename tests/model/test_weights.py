"""Weights from elsewhere.

Torchvision's classifiers, detectron2's detectors, and files that do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from contract.model import ModelConfig
from contract.presets import preset
from model.build import assemble, build_detector
from model.detector import Detector
from model.weights import from_detectron2, load_initial
from tests.model.test_arms import config

VGG = preset("vgg16-faster-rcnn")
RESNET50 = {"kind": "resnet", "depth": 50}
SMALL_VGG_HEAD = {"box_head": {"kind": "fc", "width": 32}, "mask": {"kind": "none"}}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("fpn", {"backbone": {"kind": "resnet", "depth": 18}}),
    "resnet34": ("fpn", {"backbone": {"kind": "resnet", "depth": 34}}),
    "resnet50": ("c5", {"backbone": RESNET50}),
    "resnet101": ("c4", {"backbone": {"kind": "resnet", "depth": 101}}),
    "resnext50_32x4d": ("fpn", {"backbone": {"kind": "resnext", "variant": "50-32x4d"}}),
    "resnext101_32x8d": ("fpn", {"backbone": {"kind": "resnext", "variant": "101-32x8d"}}),
    "resnext101_64x4d": ("c4", {"backbone": {"kind": "resnext", "variant": "101-64x4d"}}),
}


def pretrained(layout: str, **changes: Any) -> ModelConfig:
    return config(layout, weights={"kind": "torchvision"}, **changes)


def classifier(name: str) -> nn.Module:
    """Torchvision's network, with norms that are not the identity."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.5)
    return network.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_every_backbone_takes_its_classifier_without_the_classes(name, norm):
    layout, changes = CLASSIFIERS[name]
    cfg = pretrained(layout, backbone={**changes["backbone"], "norm": {"kind": norm}})
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
        detector = assemble(cfg)
    load_initial(detector, state, "backbone")
    load_initial(detector, {n: v for n, v in state.items() if "num_batches" not in n}, "backbone")
    with pytest.raises(ValueError, match=r"lacks 'backbone.layer1.0.conv1.weight'"):
        load_initial(
            detector, {n: v for n, v in state.items() if n != "layer1.0.conv1.weight"}, "backbone"
        )


def test_vgg_takes_its_classifier_with_fc6_and_fc7():
    with torch.device("meta"):
        state = torchvision.models.vgg16(weights=None).state_dict()
        detector = assemble(VGG)
    load_initial(detector, state, "backbone")
    with pytest.raises(ValueError, match=r"lacks 'box.trunk.fc.1.bias'"):
        load_initial(
            detector, {n: v for n, v in state.items() if n != "classifier.3.bias"}, "backbone"
        )


@torch.no_grad()
@pytest.mark.parametrize(("layout", "norm"), [("c4", "frozen_bn"), ("fpn", "bn")])
def test_a_loaded_resnet_has_torchvisions_features(layout, norm):
    network, image = classifier("resnet18"), torch.randn(1, 3, 64, 96)
    cfg = pretrained(layout, backbone={"kind": "resnet", "depth": 18, "norm": {"kind": norm}})
    detector = build_detector(cfg)
    load_initial(detector, network.state_dict(), "backbone")
    detector.train(norm == "frozen_bn")  # folded while training
    maps = detector.backbone(image)
    x = network.maxpool(F.relu(network.bn1(network.conv1(image))))
    for i, ours in enumerate(maps):
        x = getattr(network, f"layer{i + 1}")(x)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    if layout == "c4":  # at the classifier's stride, res5 is its last stage
        res5 = detector.crops.res5
        res5[0].conv1.stride = res5[0].downsample[0].stride = (2, 2)
        torch.testing.assert_close(res5(x), network.layer4(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_loaded_vgg_has_torchvisions_features_and_fc_layers():
    network, image = classifier("vgg16"), torch.randn(1, 3, 64, 96)
    detector = build_detector(VGG)
    load_initial(detector, network.state_dict(), "backbone")
    detector.eval()
    (features,) = detector.backbone(image)
    torch.testing.assert_close(features, network.features[:30](image), rtol=1e-4, atol=1e-4)
    crops = torch.randn(2, 512, 7, 7)
    ours = detector.box.trunk(crops, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(ours, network.classifier[:5](crops.flatten(1)), rtol=1e-4, atol=1e-4)


def test_a_file_that_does_not_fit_gives_one_clear_line():
    cfg = pretrained("fpn", backbone={"kind": "resnet", "depth": 18})
    own = build_detector(cfg)
    right = classifier("resnet18").state_dict()
    with torch.device("meta"):
        deeper = torchvision.models.resnet34(weights=None).state_dict()
        vgg = torchvision.models.vgg16(weights=None).state_dict()
    narrow = {**right, "bn1.weight": torch.zeros(32)}
    whole = {**right, "layer4.0.bn1.bias": torch.zeros(512, dtype=torch.int64)}
    ours = own.state_dict()
    without = {n: v for n, v in ours.items() if n != "box.class_logits.bias"}
    cases: list[tuple[Mapping[str, Tensor], str, str]] = [
        (deeper, "backbone", r"has 'layer1.2.bn1.bias', which the model has not \(and \d+ more\)"),
        (vgg, "backbone", "lacks 'backbone.conv1"),
        ({}, "backbone", "lacks 'backbone.conv1"),
        (
            {**right, "layer5.0.conv1.weight": torch.zeros(1)},
            "backbone",
            "has 'layer5.0.conv1.weight', which",
        ),
        (narrow, "backbone", r"'bn1.weight' has shape \(32,\), the model \(64,\)"),
        (whole, "backbone", "'layer4.0.bn1.bias' is torch.int64, the model's is torch.float32"),
        (
            without,
            "maskray",
            "weights in layout 'maskray': the file lacks 'box.class_logits.bias'; check",
        ),
        (right, "maskray", "the file has 'conv1.weight'; use layout: backbone"),
        (right, "torchvision", "the file has 'conv1.weight'; use layout: backbone"),
        (vgg, "detectron2", "the file has 'features.0.weight'; use layout: backbone"),
        (ours, "backbone", "the file has 'box.class_logits.weight'; use layout: maskray"),
        (right, "mmdetection", "no weights layout 'mmdetection'; there are backbone, maskray"),
    ]
    before = {name: value.clone() for name, value in own.state_dict().items()}
    for state, layout, reason in cases:
        with pytest.raises(ValueError, match=reason) as caught:
            load_initial(own, state, layout)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    grouped = config("fpn")
    with pytest.raises(ValueError, match="running_mean"):  # group norm has no statistics to load
        load_initial(build_detector(grouped), right, "backbone")


@pytest.mark.parametrize("strides", [(8, 16), (4, 8, 16), (16,), (4, 8, 16, 32)])
def test_stages_that_a_short_pyramid_does_not_build_stay_in_the_file(strides):
    """Whole stages alone; anything else too many is refused."""
    changes = {
        "backbone": {"kind": "resnet", "depth": 18},
        "weights": {"kind": "file", "path": "r18.pth"},
        "layout": {"kind": "fpn", "channels": 32, "strides": strides, "roi_strides": strides[-1:]},
    }
    cfg = ModelConfig.model_validate({**dict(preset("tiny")), **changes})
    state = classifier("resnet18").state_dict()
    detector = build_detector(cfg)
    load_initial(detector, state, "backbone")
    loaded = detector.state_dict()
    for stage in ("layer1", "layer2", "layer3", "layer4")[: 4 if strides[-1] == 32 else 3]:
        assert torch.equal(
            loaded[f"backbone.{stage}.1.conv2.weight"], state[f"{stage}.1.conv2.weight"]
        )
        assert torch.equal(
            loaded[f"backbone.{stage}.1.conv2.running_var"], state[f"{stage}.1.bn2.running_var"]
        )
    assert ("backbone.layer4.0.conv1.weight" in loaded) == (strides[-1] == 32)
    with pytest.raises(ValueError, match=r"has 'layer3.2.conv1.weight', which the model has not"):
        load_initial(detector, {**state, "layer3.2.conv1.weight": torch.zeros(1)}, "backbone")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("r50-fpn-torchvision", {"background": "last"}, "needs background 'first', not 'last'"),
        (
            "r50-fpn-torchvision",
            {"image": {"channels": "bgr"}},
            "needs image.channels 'rgb', not 'bgr'",
        ),
        (
            "r50-fpn-torchvision",
            {"backbone": {**RESNET50, "stride_in_1x1": True}},
            "stride_in_1x1 False, not True",
        ),
        ("r50-fpn-keypoint-torchvision", {"background": "last"}, "background 'first', not 'last'"),
        ("r50-fpn-detectron2", {"background": "first"}, "needs background 'last', not 'first'"),
        ("r50-fpn-detectron2", {"backbone": RESNET50}, "backbone.stride_in_1x1 True, not False"),
        ("r50-c4-detectron2", {"image": {"std": [1, 1, 1]}}, "image.channels 'bgr', not 'rgb'"),
        (
            "r50-fpn-keypoint-detectron2",
            {"image": {}, "background": "first"},
            r"'last', not 'first', image.channels 'bgr', not 'rgb', "
            r"image.std \(1.0, 1.0, 1.0\), not ",
        ),
    ],
)
def test_conventions_under_which_a_detectors_weights_mean_nothing_are_refused(
    name, changes, reason
):
    layout = name.rpartition("-")[2]
    weights = {"kind": "file", "path": "weights.pth", "layout": layout}
    right = {**dict(preset(name)), "weights": weights}
    assert ModelConfig.model_validate(right).weights.layout == layout
    with pytest.raises(ValueError, match=reason) as caught:
        ModelConfig.model_validate({**right, **changes})
    assert f"the presets that end in '-{layout}' have it right" in str(caught.value)


def test_fine_tuning_may_change_anchors_alignment_and_resizing():
    changes = {
        "anchors": {},
        "roi": {"kind": "align"},
        "image": {},
        "weights": {"kind": "torchvision"},
    }
    cfg = ModelConfig.model_validate({**dict(preset("r50-fpn-torchvision")), **changes})
    with torch.device("meta"):
        state = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None
        ).state_dict()
        load_initial(assemble(cfg), state, "torchvision")


# --- detectron2, by a second reading of its names and conventions ---------------------------------

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
