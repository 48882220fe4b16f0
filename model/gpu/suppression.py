"""Greedy non-maximum suppression of many lists on a GPU in two launches and without a sync.

The first finds which boxes overlap, the second which stay.

Axes: L lists, N boxes, best first, W words of 32 bits for N boxes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model.rpn.nms import nms_listwise

_BITS = 32


class ListSuppression(nn.Module):
    """`model.rpn.nms.Suppression` by our kernels."""

    def __init__(self, max_iou: float) -> None:
        super().__init__()
        self.max_iou = max_iou

    def forward(self, boxes_LN4: Tensor, valid_LN: Tensor) -> Tensor:
        """bool (L, N), as `model.rpn.nms.nms`."""
        return nms_in_two_launches(boxes_LN4, valid_LN, self.max_iou)


def trial() -> bool:
    """Whether the kernels decide as torch does: 70 boxes are more than two words of bits."""
    corner = torch.rand(2, 70, 2, generator=torch.Generator().manual_seed(0)) * 40
    boxes = torch.cat([corner, corner + 20], dim=2)
    valid = torch.arange(70).expand(2, -1) < 66
    kept = nms_in_two_launches(boxes.cuda(), valid.cuda(), 0.5)
    return torch.equal(kept.cpu(), nms_listwise(boxes, valid, 0.5))


def nms_in_two_launches(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """bool (L, N), as `model.rpn.nms.nms`. boxes_LN4: float32."""
    lists, boxes = valid_LN.shape
    keep = torch.zeros_like(valid_LN)
    if not keep.numel():
        return keep
    words = triton.cdiv(boxes, _BITS)
    overlaps = torch.empty(lists, boxes, words, dtype=torch.int32, device=boxes_LN4.device)
    dense = boxes_LN4.contiguous()
    # No fused multiply-add: a product and a sum in one round differently, and ties would fall
    # apart.
    _overlaps[(lists, words, words)](
        dense, overlaps, boxes, words, max_iou, _BITS, enable_fp_fusion=False
    )
    valid, width = valid_LN.contiguous().view(torch.uint8), triton.next_power_of_2(words)
    kept = keep.view(torch.uint8)
    _stay[(lists,)](
        overlaps, valid, kept, boxes, words, _BITS, width, num_warps=1, enable_fp_fusion=False
    )
    return keep


@triton.jit  # type: ignore[untyped-decorator]
def _overlaps(boxes, overlaps, num_boxes, num_words, max_iou, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sets bit k of overlaps[l, i, w] if box i and the later box BITS w + k overlap too much."""
    # 64 bits: a list's offset times its boxes and words exceeds 2 ** 31.
    number, word = tl.program_id(0).to(tl.int64), tl.program_id(2)
    bit = tl.arange(0, BITS)
    row, column = tl.program_id(1) * BITS + bit, word * BITS + bit
    row_there, column_there = row < num_boxes, column < num_boxes
    first, second = (
        boxes + (number * num_boxes + row) * 4,
        boxes + (number * num_boxes + column) * 4,
    )
    ax0, ay0 = tl.load(first, row_there, 0.0), tl.load(first + 1, row_there, 0.0)
    ax1, ay1 = tl.load(first + 2, row_there, 0.0), tl.load(first + 3, row_there, 0.0)
    bx0, by0 = tl.load(second, column_there, 0.0), tl.load(second + 1, column_there, 0.0)
    bx1, by1 = tl.load(second + 2, column_there, 0.0), tl.load(second + 3, column_there, 0.0)
    wide = tl.maximum(
        tl.minimum(ax1[:, None], bx1[None, :]) - tl.maximum(ax0[:, None], bx0[None, :]), 0.0
    )
    high = tl.maximum(
        tl.minimum(ay1[:, None], by1[None, :]) - tl.maximum(ay0[:, None], by0[None, :]), 0.0
    )
    shared = wide * high
    area_a = tl.maximum(ax1 - ax0, 0.0) * tl.maximum(ay1 - ay0, 0.0)
    area_b = tl.maximum(bx1 - bx0, 0.0) * tl.maximum(by1 - by0, 0.0)
    union = area_a[:, None] + area_b[None, :] - shared
    # The quotient rounds as torch's does, so that ties fall alike.
    # The smallest normal float in all its digits: Triton takes a smaller constant as a float64.
    iou = tl.div_rn(shared, tl.maximum(union, 1.1754943508222875e-38))
    hit = (iou > max_iou) & (column[None, :] > row[:, None]) & column_there[None, :]
    packed = tl.sum(
        tl.where(hit, tl.full((BITS,), 1, tl.int32)[None, :] << bit[None, :], 0), axis=1
    )
    tl.store(overlaps + (number * num_boxes + row) * num_words + word, packed, row_there)


@triton.jit  # type: ignore[untyped-decorator]
def _stay(overlaps, valid, keep, num_boxes, num_words, BITS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a list: box after box stays, unless a better one that stays overlaps it."""
    first = tl.program_id(0).to(tl.int64) * num_boxes
    place = tl.arange(0, WORDS)
    gone = tl.zeros((WORDS,), tl.int32)
    for box in range(num_boxes):
        word = tl.sum(tl.where(place == box // BITS, gone, 0), axis=0)
        stays = tl.load(valid + first + box).to(tl.int32) & (((word >> (box % BITS)) & 1) ^ 1)
        tl.store(keep + first + box, stays.to(tl.uint8))
        row = overlaps + (first + box) * num_words + place
        gone |= tl.load(row, place < num_words, 0) * stays
