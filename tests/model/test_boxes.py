"""Boxes, anchors, noise, matching and suppression against numbers by hand and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from model.boxes import at_least, clip, decode, encode, iou
from model.cpu.suppression import ListSuppression
from model.matching import match, sample
from model.rpn.anchors import cell_anchors, grid_anchors
from model.rpn.nms import nms, nms_fixed_shape, nms_listwise
from model.sample_hash import DROPOUT_STREAM, ROI_STREAM, RPN_STREAM, noise
from tests.model.batches import random_boxes


def test_iou_equals_torchvision_and_is_zero_for_empty_boxes():
    boxes, others = random_boxes((20,)), random_boxes((30,), seed=1)
    torch.testing.assert_close(iou(boxes, others), torchvision.ops.box_iou(boxes, others))
    empty = torch.zeros(1, 4)
    assert iou(empty, empty).item() == 0


def test_decoding_an_encoding_gives_the_box_back():
    anchors, boxes = random_boxes((50,)), random_boxes((50,), seed=1)
    offsets = encode(anchors, boxes, (10.0, 5.0))
    torch.testing.assert_close(decode(anchors, offsets, (10.0, 5.0)), boxes, rtol=0, atol=1e-3)


def test_growth_is_clamped_at_a_thousand_over_sixteen():
    box = decode(
        torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([[0.0, 0.0, 99.0, 99.0]]), (1.0, 1.0)
    )
    torch.testing.assert_close(box[0, 2] - box[0, 0], torch.tensor(1000.0))
    assert math.isclose(math.exp(math.log(1000 / 16)) * 16, 1000)


def test_boxes_are_clipped_to_their_own_image():
    boxes = torch.tensor([[[-5.0, -5.0, 500.0, 500.0]], [[-5.0, -5.0, 500.0, 500.0]]])
    clipped = clip(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert clipped.tolist() == [[[0, 0, 20, 10]], [[0, 0, 40, 30]]]
    assert at_least(clipped, 10.5).tolist() == [[False], [True]]


def test_anchors_by_hand():
    cells = cell_anchors([32, 64], [0.25, 1.0, 4.0], rounded=False)
    assert cells.tolist() == [
        [-32, -8, 32, 8],
        [-16, -16, 16, 16],
        [-8, -32, 8, 32],
        [-64, -16, 64, 16],
        [-32, -32, 32, 32],
        [-16, -64, 16, 64],
    ]
    grid = grid_anchors(cells, 1, 2, (4, 4))
    assert grid.shape == (12, 4)
    assert grid[6].tolist() == [-28, -8, 36, 8]  # the second cell, four pixels to the right


def test_rounded_anchors_are_torchvisions():
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    theirs = AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),)).generate_anchors([32], [0.5, 1.0, 2.0])
    assert torch.equal(cell_anchors([32], [0.5, 1.0, 2.0], rounded=True), theirs)


def test_every_object_keeps_its_best_anchor():
    boxes = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0], [100.0, 100.0, 120.0, 120.0]]
    )
    objects = torch.tensor(
        [[[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 104.0, 104.0], [0.0, 0.0, 10.0, 6.0]]]
    )
    found = match(boxes[None], objects, torch.tensor([[True, True, False]]))
    assert found.object_BN.tolist() == [[0, 0, 1]]
    torch.testing.assert_close(found.iou_BN, torch.tensor([[1.0, 0.6, 0.04]]))
    assert found.is_best_BN.tolist() == [[True, False, True]]


def test_matching_many_objects_in_chunks_equals_one_matrix():
    boxes, objects = random_boxes((1, 200)), random_boxes((2, 19), seed=3)
    valid = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.7
    found = match(boxes, objects, valid)
    overlap = (
        torch.stack([torchvision.ops.box_iou(o, boxes[0]) for o in objects]) * valid[:, :, None]
    )
    best, index = overlap.max(dim=1)
    torch.testing.assert_close(found.iou_BN, best)
    assert torch.equal(found.object_BN[best > 0], index[best > 0])
    highest = overlap.amax(dim=2, keepdim=True)
    assert torch.equal(found.is_best_BN, ((overlap == highest) & (highest > 0)).any(dim=1))


def test_sampling_takes_positives_first_and_fills_with_negatives():
    positive = torch.tensor([[True, True, True, False, False, False], [False] * 6])
    negative = ~positive
    negative[1, 4:] = False
    luck = torch.tensor([[5, 9, 7, 1, 3, 2], [1, 2, 3, 4, 5, 6]])
    chosen = sample(positive, negative, luck, size=4, positive_fraction=0.5)
    assert chosen.index[0].tolist() == [1, 2, 4, 5]
    assert chosen.positive[0].tolist() == [True, True, False, False]
    assert chosen.index[1].tolist() == [3, 2, 1, 0]
    assert chosen.valid.all()
    few = sample(
        positive[1:], negative[1:] & (luck[1:] > 3), luck[1:], size=4, positive_fraction=0.5
    )
    assert few.valid.tolist() == [[True, False, False, False]]


def test_noise_is_uniform_and_belongs_to_key_stream_and_index():
    draw = noise(torch.tensor([[7], [8]]), 1, torch.arange(20000))
    assert int(draw.min()) >= 0
    unit = draw.double() / 2**62
    assert abs(float(unit.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(unit)[0, 1])) < 0.03
    assert torch.equal(noise(torch.tensor(7), 1, torch.tensor(123)), draw[0, 123])
    assert not torch.equal(noise(torch.tensor([7]), 2, torch.arange(5)), draw[0, :5])
    assert len(draw.unique()) == draw.numel()


@pytest.mark.parametrize("stream", [RPN_STREAM, ROI_STREAM, DROPOUT_STREAM])
def test_noise_is_splitmix_of_unsigned_numbers(stream):
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key, index = 2**61 + 12345, 678
    seed = mix((key + stream * 0x632BE59BD9B4E019) % 2**64)
    expected = mix((seed + index * 0x9E3779B97F4A7C15) % 2**64) % 2**62
    assert int(noise(torch.tensor(key), stream, torch.tensor(index))) == expected


def by_list_suppression(boxes: torch.Tensor, valid: torch.Tensor, max_iou: float) -> torch.Tensor:
    return ListSuppression(max_iou)(boxes, valid)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), boxes=st.integers(0, 90), threshold=st.floats(0.1, 0.9))
def test_fixed_shape_suppression_is_exactly_torchvisions(seed, boxes, threshold):
    lists = random_boxes((3, boxes), seed, side=40)
    valid = torch.rand(3, boxes, generator=torch.Generator().manual_seed(seed)) < 0.9
    assert torch.equal(
        nms_fixed_shape(lists, valid, threshold), nms_listwise(lists, valid, threshold)
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    boxes=st.integers(0, 150),
    threshold=st.one_of(st.floats(0.1, 0.9), st.sampled_from([0.25, 1 / 3, 0.5, 0.7])),
    whole=st.booleans(),
)
def test_suppression_on_the_cpu_is_exactly_torchvisions(seed, boxes, threshold, whole):
    lists = random_boxes((3, boxes), seed, side=40)
    lists = (
        lists.round() if whole else lists
    )  # many overlaps that equal the threshold, and empty boxes
    valid = torch.rand(3, boxes, generator=torch.Generator().manual_seed(seed)) < 0.9
    expected = nms_listwise(lists, valid, threshold)
    assert torch.equal(nms(lists, valid, threshold), expected)
    assert torch.equal(ListSuppression(threshold)(lists, valid), expected)


@pytest.mark.parametrize("kind", [nms, nms_fixed_shape, nms_listwise, by_list_suppression])
def test_a_suppressed_box_suppresses_nobody(kind):
    chain = torch.tensor([[[0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10]]])
    assert kind(chain, torch.ones(1, 3, dtype=torch.bool), 0.3).tolist() == [[True, False, True]]
