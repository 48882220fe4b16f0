"""Weights from elsewhere: torchvision's classifiers, and files that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from contract.model import ModelConfig
from contract.presets import preset
from model.build import assemble, build_detector
from model.weights import load_initial
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
