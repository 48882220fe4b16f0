"""Detections in fixed shapes, as a GPU computes them, are those of the lists on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.boxes import encode
from model.branches.box import OFFSET_WEIGHTS, Boxes, BoxSelection
from tests.model.batches import random_boxes, shape_batch
from tests.model.test_detector import tiny

SIZES = torch.tensor([[150, 140], [90, 150], [120, 120]])  # the boxes lie in 150 x 150 px


def drawn(
    classes: int, offsets_of: int, seed: int = 0, proposals: int = 40
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Proposals around six objects an image, valid ones, scores with ties and offsets.

    The third image has no valid proposal.
    """
    generator = torch.Generator().manual_seed(seed)
    objects = random_boxes((3, 6), seed)
    near = torch.randint(0, 6, (3, proposals), generator=generator)
    around = objects.gather(1, near[:, :, None].expand(-1, -1, 4))
    boxes = around + torch.randn(3, proposals, 4, generator=generator) * 3
    wanted = around[:, :, None] + torch.randn(3, proposals, offsets_of, 4, generator=generator)
    offsets = encode(boxes[:, :, None].expand_as(wanted), wanted, OFFSET_WEIGHTS)
    # Of 50 values, so that many scores are equal.
    scores = torch.randint(0, 50, (3, proposals, classes), generator=generator) / 50
    valid = torch.arange(proposals) < torch.tensor([[proposals], [proposals - 9], [0]])
    return boxes, valid, scores, offsets


def by_lists(
    selection: BoxSelection, boxes: Tensor, valid: Tensor, scores: Tensor, offsets: Tensor
) -> Boxes:
    images = [[values[i, valid[i]] for i in range(3)] for values in (boxes, scores, offsets)]
    return selection(*images, SIZES)


@pytest.mark.parametrize("most", [5, 1000])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("classes", "offsets_of"), [(1, 1), (7, 7), (7, 1)])
def test_fixed_shapes_select_what_lists_do(classes, offsets_of, threshold, most):
    selection = BoxSelection(threshold, 0.5, most)
    given = drawn(classes, offsets_of)
    expected, found = by_lists(selection, *given), selection.padded(*given, SIZES)
    for name, values in vars(expected).items():
        assert torch.equal(getattr(found, name), values), name
    assert not found.valid[2].any()


def test_many_classes_are_suppressed_in_parts(monkeypatch):
    selection, given = BoxSelection(0.1, 0.5, 30), drawn(9, 9)
    whole = selection.padded(*given, SIZES)
    monkeypatch.setattr("model.branches.box._LISTS_AT_ONCE", 4)
    for name, values in vars(selection.padded(*given, SIZES)).items():
        assert torch.equal(values, getattr(whole, name)), name


@pytest.mark.parametrize("tasks", [False, True])
def test_keeping_padded_boxes_gives_the_same_detections(tasks, monkeypatch):
    detector = tiny(tasks)
    batch = replace(shape_batch(images=2), original_sizes=torch.tensor([[256, 256], [64, 128]]))
    # Untrained scores are all near 1 / 5: this threshold leaves padding in both images.
    monkeypatch.setattr(detector.box.selection, "score_threshold", 0.2135)
    monkeypatch.setattr(detector.box.selection, "most", 32)
    expected = detector.predict(batch)
    monkeypatch.setattr(detector, "keep_padding", True)
    found = detector.predict(batch)
    assert expected.valid.any(dim=1).all()
    assert not expected.valid.all(dim=1).any()
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.labels, expected.labels)
    assert list(found.masks) == list(expected.masks)
    for name, values in expected.masks.items():
        torch.testing.assert_close(found.masks[name], values, rtol=1e-4, atol=1e-4)
    for name in ("boxes_xyxy", "scores", "keypoints"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )
