"""Exact greedy non-maximum suppression of many lists at once.

Axes: L lists (an image's level, or an image's class), N boxes, best first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torchvision
from torch import Tensor

from model.boxes import iou
from model.cpu import native

_BLOCK = 62  # boxes decided together, as the bits of one int64


def nms(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """bool (L, N): valid boxes that overlap no better kept box of their list by more than `max_iou`.

    The CPU takes list by list: neither loops nor lengths cost a sync there. A GPU takes two kernels of ours, or without
    Triton to compile them some thousand small ones of torch.
    """
    if native.takes(boxes_LN4) and valid_LN.dtype == torch.bool:
        keep, room = valid_LN.new_empty(valid_LN.shape), native.workspace(6 * valid_LN.numel())
        native.run(
            "nms",
            boxes_LN4.contiguous(),
            valid_LN.contiguous(),
            keep,
            room,
            *valid_LN.shape,
            max_iou,
        )
        return keep
    if boxes_LN4.device.type == "cpu":
        return nms_listwise(boxes_LN4, valid_LN, max_iou)
    on_gpu = _kernels()
    return (
        nms_fixed_shape(boxes_LN4, valid_LN, max_iou)
        if on_gpu is None
        else on_gpu(boxes_LN4, valid_LN, max_iou)
    )


@cache
def _kernels() -> Callable[[Tensor, Tensor, float], Tensor] | None:
    try:
        from model.rpn.nms_kernels import nms_in_two_launches
    except ImportError:  # torch comes without Triton on some platforms
        return None
    return nms_in_two_launches


def nms_listwise(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """Torchvision's."""
    keep = torch.zeros_like(valid_LN)
    order = torch.arange(valid_LN.shape[1], 0, -1, dtype=torch.float32)
    for boxes, valid, kept in zip(boxes_LN4, valid_LN, keep, strict=True):
        index = valid.nonzero()[:, 0]
        kept[index[torchvision.ops.nms(boxes[index], order[index], max_iou)]] = True
    return keep


def nms_fixed_shape(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """The same without data-dependent shapes or a host sync: blocks of boxes in turn, decided bit by bit inside."""
    boxes = valid_LN.shape[1]
    alive = valid_LN.clone()
    place = torch.arange(_BLOCK, device=boxes_LN4.device)
    bits = torch.ones_like(place) << place
    for start in range(0, boxes, _BLOCK):
        stop = min(start + _BLOCK, boxes)
        size = stop - start
        overlaps = (
            iou(boxes_LN4[:, start:stop], boxes_LN4[:, start:]) > max_iou
        )  # (L, size, N - start)
        spared = ~(overlaps[:, :, :size].triu(1) * bits[:size]).sum(
            dim=2
        )  # what each box of the block leaves alive
        word = (alive[:, start:stop] * bits[:size]).sum(dim=1)
        for i in range(size):
            word = torch.where((word & (1 << i)) != 0, word & spared[:, i], word)
        kept = (word[:, None] & bits[:size]) != 0
        later = (overlaps[:, :, size:] & kept[:, :, None]).any(dim=1)
        alive = torch.cat([alive[:, :start], kept, alive[:, stop:] & ~later], dim=1)
    return alive
