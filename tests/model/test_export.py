"""Our weights by the names of torchvision and detectron2: the same tensors and predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.transforms.functional import pil_to_tensor

from contract.model import FrozenBatchNorm, ModelConfig, ResNet
from contract.presets import preset
from model.build import assemble, build_detector
from model.detector import Detector
from model.export import ImageProgram, to_detectron2, to_torchvision
from model.weights import from_detectron2, from_torchvision
from tests.model.branches.test_masks import COCO, needs_coco
from tests.model.test_torchvision_parity import theirs

TINY_BOXES = ModelConfig.model_validate(
    {**dict(preset("r50-fpn-torchvision")), "num_classes": 3, "mask": {"kind": "none"}}
)


def scrambled(cfg: ModelConfig) -> Detector:
    """A detector in which every tensor differs from every other."""
    torch.manual_seed(0)
    detector = assemble(cfg)
    for value in detector.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    return detector.eval()


def test_torchvision_gets_back_what_came_from_it():
    their_model = theirs(maskrcnn_resnet50_fpn)
    detector = build_detector(cfg := preset("r50-fpn-torchvision"))
    detector.load_state_dict(from_torchvision(their_model.state_dict()))
    exported = to_torchvision(cfg, detector)
    for name, value in their_model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        # of the background nothing reads offsets and mask, so we keep none
        skipped = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(name.split(".")[-2], 0)
        skipped = 0 if name.startswith("rpn.") else skipped
        assert torch.equal(exported[name][skipped:], value[skipped:]), name
    their_model.load_state_dict(exported)


@pytest.mark.parametrize("name", ["r50-fpn-detectron2", "r50-fpn-keypoint-detectron2"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_detectron2s_names_lead_back_to_ours(name, norm):
    cfg = preset(name)
    backbone = {"kind": "resnet", "stride_in_1x1": True, "norm": {"kind": norm}}
    cfg = ModelConfig.model_validate({**dict(cfg), "backbone": backbone})
    detector = scrambled(cfg)
    exported = to_detectron2(cfg, detector)
    assert "backbone.bottom_up.stem.conv1.norm.running_var" in exported
    assert "backbone.bottom_up.res2.0.shortcut.norm.weight" in exported
    if norm == "frozen_bn":
        back, own = from_detectron2(exported), detector.state_dict()
        assert back.keys() == own.keys()
        assert all(torch.equal(back[key], own[key]) for key in own)


def test_a_background_that_stands_last_moves_to_the_front():
    last = ModelConfig.model_validate({**dict(TINY_BOXES), "background": "last"})
    detector = scrambled(last)
    own = detector.state_dict()["box.class_logits.bias"]
    bias = to_torchvision(last, detector)["roi_heads.box_predictor.cls_score.bias"]
    assert bias.tolist() == [own[3], *own[:3].tolist()]


def test_another_epsilon_goes_into_the_weights():
    zero = TINY_BOXES.model_copy(update={"backbone": ResNet(norm=FrozenBatchNorm(eps=0))})
    detector = scrambled(zero)
    exported, own = to_torchvision(zero, detector), detector.state_dict()
    theirs_w = exported["backbone.body.bn1.weight"].double()
    scale = theirs_w / (exported["backbone.body.bn1.running_var"].double() + 1e-5).sqrt()
    ours = own["backbone.conv1.norm_weight"] / own["backbone.conv1.running_var"].sqrt()
    torch.testing.assert_close(scale, ours.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "changes", "to", "words"),
    [
        ("r50-fpn", {}, to_torchvision, "image.resize is 'antialias'"),
        ("r50-fpn", {}, to_detectron2, "roi.samples is 2, not 0"),
        ("r50-fpn-torchvision", {"roi": {"kind": "pool"}}, to_torchvision, "roi.kind is 'pool'"),
        (
            "r50-fpn-torchvision",
            {"mask": {"kind": "mask", "loss": {"kind": "softmax"}}},
            to_torchvision,
            "mask.loss is kind 'softmax'",
        ),
        ("tiny", {}, to_torchvision, "backbone.norm.kind is 'gn'"),
        ("r50-c4-detectron2", {}, to_detectron2, "layout is"),
        ("vgg16-faster-rcnn", {}, to_torchvision, "backbone.kind is 'vgg16'"),
        (
            "r50-fpn-torchvision",
            {"rpn": {"min_side_px": 4}},
            to_torchvision,
            "rpn.min_side_px is 4.0, not 0.001",
        ),
        (
            "r50-fpn-detectron2",
            {"image": {**dict(preset("r50-fpn-detectron2").image), "canvas_multiple_px": 64}},
            to_detectron2,
            "image.canvas_multiple_px is 64, not 32",
        ),
    ],
)
def test_what_cannot_be_expressed_is_named_in_one_line(name, changes, to, words):
    cfg = ModelConfig.model_validate({**dict(preset(name)), **changes})
    with torch.device("meta"):
        detector = assemble(cfg)
    with pytest.raises(ValueError, match="cannot express this model") as caught:
        to(cfg, detector)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_gives_what_the_detector_gives(tmp_path):
    torch.manual_seed(0)
    detector = build_detector(preset("tiny"))
    image, other = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(ImageProgram(detector), (image,))
    torch.export.save(program, tmp_path / "p.pt2")
    boxes, scores, labels, valid, masks = torch.export.load(tmp_path / "p.pt2").module()(other)
    expected = detector.detect_image(other)
    assert torch.equal(boxes[valid], expected.boxes_xyxy[expected.valid])
    assert torch.equal(scores[valid], expected.scores[expected.valid])
    assert torch.equal(labels[valid], expected.labels[expected.valid])
    assert torch.equal(masks[valid], expected.masks["sigmoid"][expected.valid])


@needs_coco
@pytest.mark.slow
def test_torchvision_predicts_the_same_on_20_real_images():
    """With drawn weights: released ones lie behind the network."""
    their_model = theirs(maskrcnn_resnet50_fpn)
    trained: Any = preset("r50-fpn-torchvision")
    inference = trained.inference.model_copy(
        update={"score_threshold": 0.0, "detections_per_image": 8}
    )
    image = trained.image.model_copy(update={"short_side_px": 128, "max_side_px": 208})
    cfg = trained.model_copy(update={"inference": inference, "image": image})
    detector = build_detector(cfg)
    detector.load_state_dict(from_torchvision(their_model.state_dict()))
    their_model.load_state_dict(to_torchvision(cfg, detector))
    paths = sorted((COCO / "val2017").glob("*.jpg"))[:20]
    assert len(paths) == 20
    worst = 0.0
    for path in paths:
        pixels = pil_to_tensor(Image.open(path).convert("RGB"))
        with torch.no_grad():
            expected = their_model([pixels.float() / 255])[0]
        found = detector.predict_image(pixels)
        assert torch.equal(found["labels"], expected["labels"])
        for kind in ("boxes", "scores"):
            worst = max(worst, float((found[kind] - expected[kind]).abs().max()))
        worst = max(worst, float((found["masks"] - expected["masks"][:, 0]).abs().max()))
    assert worst < 1e-5, worst
