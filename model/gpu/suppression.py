"""Greedy non-maximum suppression of many lists on a GPU in two launches and without a sync.

The first finds which boxes overlap, the second which stay, 32 boxes at a time.

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
        # Only a compiler needs the operator: Inductor cannot view what it computes as other bits.
        nms = _operator if torch.compiler.is_compiling() else nms_in_two_launches
        kept: Tensor = nms(boxes_LN4, valid_LN, self.max_iou)
        return kept


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
    keep = torch.empty_like(valid_LN, memory_format=torch.contiguous_format)
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
    warps = 4 if width <= 128 else 8
    _stay[(lists,)](overlaps, valid, kept, boxes, words, _BITS, width, num_warps=warps)
    return keep


_operator = torch.library.custom_op("maskray::suppression", nms_in_two_launches, mutates_args=())


@_operator.register_fake
def _fake(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(valid_LN, memory_format=torch.contiguous_format)


@triton.jit  # type: ignore[untyped-decorator]
def _overlaps(boxes, overlaps, num_boxes, num_words, max_iou, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sets bit k of overlaps[l, i, w] if box i and box BITS w + k overlap too much.

    In the block of box i these are the earlier boxes, and later ones in later blocks. Words of
    earlier blocks are not written.
    """
    # 64 bits: a list's offset times its boxes and words exceeds 2 ** 31.
    number, block, word = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if word < block:
        return
    bit = tl.arange(0, BITS)
    row, column = block * BITS + bit, word * BITS + bit
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
    wanted = (word > block) | (column[None, :] < row[:, None])
    hit = (iou > max_iou) & wanted & column_there[None, :]
    packed = tl.sum(
        tl.where(hit, tl.full((BITS,), 1, tl.int32)[None, :] << bit[None, :], 0), axis=1
    )
    tl.store(overlaps + (number * num_boxes + row) * num_words + word, packed, row_there)


@triton.jit  # type: ignore[untyped-decorator]
def _stay(overlaps, valid, keep, num_boxes, num_words, BITS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a list: block after block is decided, then takes boxes from later blocks."""
    first = tl.program_id(0).to(tl.int64) * num_boxes
    place, bit = tl.arange(0, WORDS), tl.arange(0, BITS)
    gone = tl.zeros((WORDS,), tl.int32)
    for block in range(num_words):
        row = block * BITS + bit
        there, words = row < num_boxes, overlaps + (first + row) * num_words
        later = there[:, None] & ((place > block) & (place < num_words))[None, :]
        taken = tl.load(words[:, None] + place[None, :], later, 0)
        rivals = tl.load(words + block, there, 0)
        candidate = tl.load(valid + first + row, there, 0).to(tl.int32)
        candidate &= ((tl.sum(tl.where(place == block, gone, 0), axis=0) >> bit) & 1) ^ 1
        # A box stays unless an earlier one that stays is a rival. Starting from all candidates,
        # each round decides one more box at least; most blocks settle in a few.
        stays = candidate
        word = tl.sum(stays << bit, axis=0)
        before = word ^ 1
        while word != before:
            before = word
            stays = tl.where((rivals & word) == 0, candidate, 0)
            word = tl.sum(stays << bit, axis=0)
        tl.store(keep + first + row, stays.to(tl.uint8), there)
        gone |= tl.reduce_or(tl.where(stays[:, None] != 0, taken, 0), axis=0)
