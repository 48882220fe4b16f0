"""Which object each box matches, and which boxes train: fixed shapes, no loop over images.

Axes: B images, N boxes (anchors or RoI candidates), G padded objects, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.boxes import iou
from model.sample_hash import noise

_OBJECTS_AT_ONCE = 8  # bounds the memory of the IoU matrix at B x 8 x N


class Match(NamedTuple):
    """The best object of each box.

    object_BN: its index, the lowest one on ties. iou_BN: its IoU, 0 without objects.


    is_best_BN: the box reaches the highest IoU that some object has with any box (and that is above
    0).
    """

    object_BN: Tensor
    iou_BN: Tensor
    is_best_BN: Tensor


def match(boxes_BN4: Tensor, objects_BG4: Tensor, valid_BG: Tensor) -> Match:
    """Matches boxes to the valid objects of their image.

    boxes_BN4: (1, N, 4) if all images share them.
    """
    images, objects = valid_BG.shape
    shape = (images, boxes_BN4.shape[1])
    best_iou = boxes_BN4.new_zeros(shape)
    best_object = torch.zeros(shape, dtype=torch.int64, device=boxes_BN4.device)
    is_best = torch.zeros(shape, dtype=torch.bool, device=boxes_BN4.device)
    # The maximum over chunks keeps the lowest object on ties, because a later one must be better.
    for start in range(0, objects, _OBJECTS_AT_ONCE):
        chunk = slice(start, start + _OBJECTS_AT_ONCE)
        overlap = iou(objects_BG4[:, chunk], boxes_BN4) * valid_BG[:, chunk, None]
        highest = overlap.amax(dim=2, keepdim=True)
        is_best |= ((overlap == highest) & (highest > 0)).any(dim=1)
        chunk_iou, chunk_object = overlap.max(dim=1)
        better = chunk_iou > best_iou
        best_object = torch.where(better, chunk_object + start, best_object)
        best_iou = torch.where(better, chunk_iou, best_iou)
    return Match(best_object, best_iou, is_best)


@dataclass(frozen=True)
class Sample:
    """Indices (B, S) into the boxes: positives, then negatives, then padding (valid is False).

    Positives stand in the first `most_positives` columns.
    """

    index: Tensor
    valid: Tensor
    positive: Tensor
    most_positives: int


@dataclass(frozen=True)
class Rule:
    """Which boxes may train, and how many.

    At most `size` an image, at most `positive_fraction` of them positive. A box is positive if its
    IoU with an object is `positive_iou` or more, or with `best_is_positive` if it is an object's
    best; else it is negative if its IoU is below `negative_iou`. Noise of `stream` draws them.
    """

    size: int
    positive_fraction: float
    positive_iou: float
    negative_iou: float
    best_is_positive: bool
    stream: int

    def shape(self, boxes: int) -> tuple[int, int]:
        """Slots and most positives of an image with so many boxes."""
        return min(self.size, boxes), min(int(self.size * self.positive_fraction), boxes)


class Chosen(NamedTuple):
    """The sample, and of its slots (B, S) the matched object and the noise that drew the box."""

    sample: Sample
    object_BS: Tensor
    noise_BS: Tensor


class MatchedSampling(nn.Module):
    """Matching and sampling as a part: `model.gpu` has a faster one."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self,
        boxes_BN4: Tensor,
        eligible_BN: Tensor | None,
        identity_BN: Tensor | None,
        objects_BG4: Tensor,
        valid_BG: Tensor,
        noise_keys_B: Tensor,
    ) -> Chosen:
        """The boxes that train on the valid objects of their image.

        boxes_BN4: (1, N, 4) if all images share them. eligible_BN: all are if it is None.
        identity_BN: what noise of a box is drawn from, its place in the list if it is None.
        """
        rule = self.rule
        if identity_BN is None:
            identity_BN = torch.arange(boxes_BN4.shape[1], device=boxes_BN4.device)
        matches = match(boxes_BN4, objects_BG4, valid_BG)
        positive = matches.iou_BN >= rule.positive_iou
        if rule.best_is_positive:
            positive = positive | matches.is_best_BN
        negative = (matches.iou_BN < rule.negative_iou) & ~positive
        if eligible_BN is not None:
            positive, negative = positive & eligible_BN, negative & eligible_BN
        luck = noise(noise_keys_B[:, None], rule.stream, identity_BN)
        sampled = sample(positive, negative, luck, rule.size, rule.positive_fraction)
        return Chosen(
            sampled, matches.object_BN.gather(1, sampled.index), luck.gather(1, sampled.index)
        )


def sample(
    positive_BN: Tensor, negative_BN: Tensor, noise_BN: Tensor, size: int, positive_fraction: float
) -> Sample:
    """At most `size` boxes an image, at most that fraction positive; negatives fill the rest.

    Those with the largest noise win, so a box's luck does not depend on its place in the list.
    """
    # Masked top-k in place of `nonzero`: its length depends on data, and a GPU would wait for it.
    boxes = positive_BN.shape[1]
    most_positives = min(int(size * positive_fraction), boxes)
    positive_noise, positive_index = torch.topk(
        torch.where(positive_BN, noise_BN, -1), most_positives, dim=1
    )
    negative_noise, negative_index = torch.topk(
        torch.where(negative_BN, noise_BN, -1), min(size, boxes), dim=1
    )
    positive_valid = (
        positive_noise >= 0
    )  # noise is never negative, so -1 marks what was not eligible
    room = size - positive_valid.sum(dim=1, keepdim=True)
    place = torch.arange(negative_index.shape[1], device=noise_BN.device)
    negative_valid = (negative_noise >= 0) & (place < room)
    valid = torch.cat([positive_valid, negative_valid], dim=1)
    # Stable, so that positives stay before negatives when padding moves to the end.
    order = torch.argsort(valid.int(), dim=1, descending=True, stable=True)[:, : min(size, boxes)]
    index = torch.cat([positive_index, negative_index], dim=1).gather(1, order)
    return Sample(
        index,
        valid.gather(1, order),
        order < positive_valid.sum(dim=1, keepdim=True),
        most_positives,
    )


def take_rows(values_BNX: Tensor, index_BS: Tensor) -> Tensor:
    """values[b, index[b, s]]: (B, N, X) and (B, S) to (B, S, X)."""
    return values_BNX.gather(1, index_BS[:, :, None].expand(-1, -1, values_BNX.shape[2]))
