"""Exact greedy non-maximum suppression of many lists at once.

Axes: L lists (an image's level, or an image's class), N boxes, best first.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from model.boxes import iou

_BLOCK = 32  # boxes decided together; their mutual overlaps fit the bits of one int64


def nms(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """bool (L, N): valid boxes that overlap no better kept box of their list by more than `max_iou`.

    The CPU takes torchvision's, list by list: it is faster there, where neither loops nor lengths cost a sync.
    """
    if boxes_LN4.device.type == "cpu":
        return nms_listwise(boxes_LN4, valid_LN, max_iou)
    return nms_fixed_shape(boxes_LN4, valid_LN, max_iou)


def nms_listwise(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    keep = torch.zeros_like(valid_LN)
    order = torch.arange(valid_LN.shape[1], 0, -1, dtype=torch.float32)
    for boxes, valid, kept in zip(boxes_LN4, valid_LN, keep, strict=True):
        index = valid.nonzero()[:, 0]
        kept[index[torchvision.ops.nms(boxes[index], order[index], max_iou)]] = True
    return keep


def nms_fixed_shape(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """The same without data-dependent shapes or a host sync: blocks of 32 boxes in turn, decided bit by bit inside."""
    lists, boxes = valid_LN.shape
    alive = valid_LN.clone()
    bits = torch.ones((), dtype=torch.int64, device=boxes_LN4.device) << torch.arange(_BLOCK, device=boxes_LN4.device)
    for start in range(0, boxes, _BLOCK):
        stop = min(start + _BLOCK, boxes)
        block = boxes_LN4[:, start:stop]
        overlaps = iou(block, boxes_LN4[:, start:]) > max_iou  # (L, block, N - start)
        rows = (overlaps[:, :, : stop - start] * bits[: stop - start]).sum(dim=2)  # whom each box of the block removes
        removed = torch.zeros(lists, dtype=torch.int64, device=boxes_LN4.device)
        kept = []
        for i in range(stop - start):
            keeps = alive[:, start + i] & ((removed >> i) & 1 == 0)
            removed = torch.where(keeps, removed | rows[:, i], removed)
            kept.append(keeps)
        kept_block = torch.stack(kept, dim=1)
        later = (overlaps[:, :, stop - start :] & kept_block[:, :, None]).any(dim=1)
        alive = torch.cat([alive[:, :start], kept_block, alive[:, stop:] & ~later], dim=1)
    return alive
