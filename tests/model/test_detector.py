"""Padding, order and the cut into batches change no loss; an image may be empty."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from contract.model import (
    FixedProposals,
    KeypointBranch,
    MaskBranch,
    ModelConfig,
    NoMask,
    RoIPool,
    RoISampling,
    RoIWarp,
    SoftmaxMask,
)
from contract.presets import preset
from model.build import build_detector
from model.detector import Detector
from model.matching import take_rows
from model.structures import Batch, LossTerm
from tests.model.batches import rows, shape_batch, with_padding

MANY_TASKS = {
    "mask": MaskBranch(loss=SoftmaxMask(others="own_class")),
    "keypoints": KeypointBranch(num_keypoints=3, convs=1, width=16),
}


@cache
def tiny(tasks: bool = False) -> Detector:
    """The `tiny` preset with so few RoIs that sampling has to choose.

    `tasks` adds softmax masks and keypoints.
    """
    cfg = preset("tiny").model_copy(
        update={"sampling": RoISampling(rois_per_image=24), **(MANY_TASKS if tasks else {})}
    )
    return build_detector(cfg)


def losses(detector: Detector, batch: Batch) -> dict[str, tuple[float, float]]:
    with torch.no_grad():
        return {
            name: (float(term.sum), float(term.count))
            for name, term in detector.losses(batch).items()
        }


def assert_same(one: dict[str, tuple[float, float]], other: dict[str, tuple[float, float]]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][1] == other[name][1], name
        assert math.isclose(one[name][0], other[name][0], rel_tol=1e-4, abs_tol=1e-4), name


@pytest.mark.parametrize("tasks", [False, True])
def test_padded_objects_change_nothing(tasks):
    batch = shape_batch(num_keypoints=3)
    assert_same(losses(tiny(tasks), batch), losses(tiny(tasks), with_padding(batch, 5)))


@pytest.mark.parametrize("tasks", [False, True])
def test_keeping_padded_rois_gives_the_same_numbers_and_gradients(tasks):
    detector, batch = tiny(tasks), with_padding(shape_batch(num_keypoints=3), 2)
    dropped, kept = losses(detector, batch), {}
    dropped_gradients = gradients(detector, batch)
    detector.keep_padding = True
    try:
        kept, kept_gradients = losses(detector, batch), gradients(detector, batch)
    finally:
        detector.keep_padding = False
    assert_same(dropped, kept)
    for name, gradient in dropped_gradients.items():
        torch.testing.assert_close(gradient, kept_gradients[name], rtol=1e-3, atol=1e-4)


def gradients(detector: Detector, batch: Batch) -> dict[str, Tensor]:
    detector.zero_grad()
    total(detector.losses(batch)).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def total(terms: dict[str, LossTerm]) -> Tensor:
    return torch.stack(
        [term.weight * term.sum / term.count.clamp(min=1) for term in terms.values()]
    ).sum()


def test_the_order_of_images_changes_nothing():
    batch = shape_batch(images=3, num_keypoints=3)
    assert_same(losses(tiny(True), batch), losses(tiny(True), rows(batch, [2, 0, 1])))


def test_a_batch_cut_in_two_adds_up_to_the_whole():
    batch = shape_batch(images=4, num_keypoints=3)
    parts = [losses(tiny(True), rows(batch, index)) for index in ([0, 1], [2, 3])]
    added = {
        name: (parts[0][name][0] + parts[1][name][0], parts[0][name][1] + parts[1][name][1])
        for name in parts[0]
    }
    assert_same(losses(tiny(True), batch), added)


def test_noise_keys_decide_what_is_sampled():
    batch = shape_batch()
    one, other = (
        losses(tiny(), batch),
        losses(tiny(), replace(batch, noise_keys=batch.noise_keys + 1)),
    )
    assert one["rpn_objectness"][0] != other["rpn_objectness"][0]


def test_counts_are_those_of_the_losses():
    batch = shape_batch(num_keypoints=3)
    counts = tiny(True).counts(batch)
    assert {name: float(value) for name, value in counts.items()} == {
        name: count for name, (_, count) in losses(tiny(True), batch).items()
    }
    assert not any(value.requires_grad for value in counts.values())
    assert float(counts["keypoints"]) > 0


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("slots", [0, 1])
def test_images_without_objects_train_every_parameter(tasks, slots):
    batch = shape_batch(objects=0, num_keypoints=3)
    if slots == 0:
        names = ("boxes_xyxy", "labels", "valid", "mask_crops", "keypoints")
        batch = replace(batch, **{name: getattr(batch, name)[:, :0] for name in names})
    detector = tiny(tasks)
    detector.zero_grad()
    terms = detector.losses(batch)
    total(terms).backward()
    assert float(terms["mask"].sum.detach()) == float(terms["mask"].count) == 0
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("label", [-1, 4, 5, 9])
def test_a_label_that_is_no_class_fails(background, label):
    """Of 4 classes; it must not become the background or wrap around to another class."""
    cfg = preset("tiny").model_copy(update={"background": background, "mask": NoMask()})
    batch = shape_batch(images=1, objects=2, side=64)
    batch.labels[0, 1] = label
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        build_detector(cfg).losses(batch)


@pytest.mark.parametrize("method", ["losses", "counts", "predict", "propose"])
def test_a_batch_without_images_is_refused(method):
    with pytest.raises(ValueError, match="the batch has no image"):
        getattr(tiny(), method)(rows(shape_batch(), []))


def test_one_object_gets_positives_and_its_mask_loss():
    terms = losses(tiny(), shape_batch(images=1, objects=1))
    assert terms["mask"][1] >= 1
    assert math.isclose(terms["mask"][0] / terms["mask"][1], math.log(2), rel_tol=0.05)


def test_padding_of_the_canvas_is_exactly_zero_for_the_network():
    batch = shape_batch(images=1)
    cut = replace(batch, sizes=torch.tensor([[96, 64]]))
    dirty = cut.images.clone()
    dirty[:, :, 96:] = 255
    dirty[:, :, :, 64:] = 7
    assert_same(losses(tiny(), cut), losses(tiny(), replace(cut, images=dirty)))


def test_predictions_are_padded_sorted_and_in_the_files_pixels():
    batch = replace(shape_batch(images=2), original_sizes=torch.tensor([[256, 256], [64, 128]]))
    found = tiny(True).predict(batch)
    most = preset("tiny").inference.detections_per_image
    assert found.boxes_xyxy.shape == (2, most, 4)
    assert list(found.masks) == ["argmax", "probability", "versus_background"]
    assert all(m.shape == (2, most, 28, 28) for m in found.masks.values())
    assert found.keypoints.shape == (2, most, 3, 3)
    assert (found.scores.diff(dim=1) <= 0).all()
    for boxes, valid, size in zip(found.boxes_xyxy, found.valid, batch.original_sizes, strict=True):
        assert valid.any()
        assert (boxes[valid][:, 2] <= size[1]).all()
        assert (boxes[valid][:, 3] <= size[0]).all()
        assert not boxes[~valid].any()


@pytest.mark.parametrize(
    "shape",
    [(1, 40, 50), (4, 40, 50), (40, 50), (40, 50, 3), (1, 3, 40, 50), (3, 0, 50), (3, 40, 0), ()],
)
def test_an_image_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"(3, H, W) in 0 to 255; this is uint8 {shape}")
    ):
        tiny().predict_image(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_an_image_of_another_type_is_refused(dtype):
    with pytest.raises(ValueError, match=re.escape(f"this is {str(dtype)[6:]} (3, 40, 50)")):
        tiny().predict_image(torch.ones(3, 40, 50, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 300), (3, 40, 50)])
def test_an_image_of_any_size_is_read(shape):
    found = tiny().predict_image(torch.full(shape, 200, dtype=torch.uint8))
    assert found["masks"].shape == (len(found["boxes"]), *shape[1:])


def test_proposals_come_in_the_files_pixels():
    batch = shape_batch(images=2)
    boxes, scores, valid = tiny().propose(batch)
    double, _, _ = tiny().propose(replace(batch, original_sizes=batch.sizes * 2))
    torch.testing.assert_close(double, boxes * 2)
    assert boxes.shape[:2] == scores.shape == valid.shape
    assert (scores[valid] > 0).all()


def test_fixed_proposals_take_the_place_of_the_rpn():
    cfg = ModelConfig.model_validate({**dict(preset("tiny")), "proposals": FixedProposals(uri="p")})
    detector = build_detector(cfg)
    batch = shape_batch()
    with pytest.raises(ValueError, match="carries no proposals"):
        detector.losses(batch)
    noisy = batch.boxes_xyxy + torch.tensor([2.0, -3.0, 4.0, 1.0])
    given = replace(batch, proposals_xyxy=torch.cat([noisy, torch.zeros(2, 4, 4)], dim=1))
    terms = losses(detector, given)
    assert set(terms) == {"box_class", "box_regression", "mask"}
    assert terms["mask"][1] == 12  # three proposals and three objects of two images
    assert detector.predict(given).valid.any()
    with pytest.raises(ValueError, match="no RPN"):
        detector.propose(given)


def test_arms_share_every_parameter_that_both_have():
    """Pairs differ where their configs do: initialisation belongs to (seed, name)."""
    one = build_detector(preset("tiny"), seed=5).state_dict()
    other = build_detector(
        preset("tiny").model_copy(update={"roi": RoIWarp(), **MANY_TASKS}), seed=5
    ).state_dict()
    same = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert len(same) > 60
    assert all(torch.equal(one[name], other[name]) for name in same)
    assert {n for n in one if n not in same} <= {f"mask.head.{part}" for part in mask_parts(one)}
    third = build_detector(preset("tiny"), seed=6).state_dict()
    assert not torch.equal(one["backbone.conv1.weight"], third["backbone.conv1.weight"])


def mask_parts(state: dict[str, Tensor]) -> list[str]:
    return [name.removeprefix("mask.head.") for name in state if name.startswith("mask.head.")]


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_detector(preset("tiny").model_copy(update={"roi": RoIPool()}))
    assert torch.equal(before, torch.get_rng_state())


def test_the_rpn_computes_sampled_anchors_as_it_computes_all():
    """The loss reads `at`; here the same sum through all anchors, with a dense backward pass."""
    detector, batch = tiny(), shape_batch(images=2)
    rpn = detector.rpn
    step = detector._prepare(batch)
    maps = [m.detach().requires_grad_() for m in step.maps.rpn]
    index = step.rpn_targets.sample.index
    corner = torch.tensor([[0, len(torch.cat(step.outputs.anchors)) - 1]]).expand(2, -1)
    index = torch.cat([index, corner], dim=1)  # cells at the maps' edges too

    def dense() -> tuple[Tensor, Tensor]:
        outputs = type(rpn).forward.__wrapped__(rpn, maps, (128, 128))
        logits, offsets = torch.cat(outputs.logits, dim=1), torch.cat(outputs.offsets, dim=1)
        return logits.gather(1, index), take_rows(offsets, index)

    weights = torch.randn(index.shape), torch.randn(*index.shape, 4)
    found = []
    for logits, offsets in (rpn.at(maps, index), dense()):
        loss = (logits * weights[0]).sum() + (offsets * weights[1]).sum()
        found.append((logits, offsets, *torch.autograd.grad(loss, [*maps, *rpn.parameters()])))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_padded_candidates_change_nothing():
    cfg = ModelConfig.model_validate({**dict(preset("tiny")), "proposals": FixedProposals(uri="p")})
    detector, batch = build_detector(cfg), shape_batch()
    given = replace(batch, proposals_xyxy=batch.boxes_xyxy + torch.tensor([2.0, -3.0, 4.0, 1.0]))
    padded = torch.cat([given.proposals_xyxy, torch.zeros(2, 7, 4)], dim=1)
    assert_same(losses(detector, given), losses(detector, replace(given, proposals_xyxy=padded)))


def test_bfloat16_leaves_boxes_and_losses_in_float32():
    detector, batch = tiny(True), shape_batch(images=1, objects=2, side=64, num_keypoints=3)
    with torch.autocast("cpu", torch.bfloat16):
        step = detector._prepare(batch)
        terms = detector.losses(batch)
    assert step.maps.roi[0].dtype == torch.bfloat16
    assert step.samples.rois_xyxy.dtype == step.outputs.anchors[0].dtype == torch.float32
    exact = losses(detector, batch)
    for name, term in terms.items():
        assert term.sum.dtype == torch.float32, name
        mean, expected = (
            float(term.sum.detach()) / float(term.count),
            exact[name][0] / exact[name][1],
        )
        assert math.isclose(mean, expected, rel_tol=0.2), (
            name
        )  # sampling may change with the proposals
    total(terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
