"""Exact greedy non-maximum suppression of many lists at once.

Axes: L lists (an image's level, or an image's class), N boxes, best first.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from model.boxes import iou

_BLOCK = 62  # boxes that are decided together, as the bits of one int64


class Suppression(nn.Module):
    """Suppression as a part: `model.cpu` and `model.gpu` have faster ones."""

    def __init__(self, max_iou: float) -> None:
        super().__init__()
        self.max_iou = max_iou

    def forward(self, boxes_LN4: Tensor, valid_LN: Tensor) -> Tensor:
        """bool (L, N), as `nms`."""
        return nms(boxes_LN4, valid_LN, self.max_iou)


def nms(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """bool (L, N): the valid boxes that overlap no better kept box of their list too much.

    Too much is an IoU of more than `max_iou`.

    A GPU takes some thousand small kernels of torch here; `model.gpu` has two of ours for it.
    """
    # On the CPU neither loops nor lengths cost a sync.
    if boxes_LN4.device.type == "cpu":
        return nms_listwise(boxes_LN4, valid_LN, max_iou)
    return nms_fixed_shape(boxes_LN4, valid_LN, max_iou)


def nms_listwise(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """Torchvision's, list by list."""
    # Torchvision sorts by score: falling numbers keep the order.
    keep = torch.zeros_like(valid_LN)
    order = torch.arange(valid_LN.shape[1], 0, -1, dtype=torch.float32)
    for boxes, valid, kept in zip(boxes_LN4, valid_LN, keep, strict=True):
        index = valid.nonzero()[:, 0]
        kept[index[torchvision.ops.nms(boxes[index], order[index], max_iou)]] = True
    return keep


def nms_fixed_shape(boxes_LN4: Tensor, valid_LN: Tensor, max_iou: float) -> Tensor:
    """As `nms`, without shapes that depend on data and without a host sync.

    It decides block after block, and in a block box after box by its bit.
    """
    boxes = valid_LN.shape[1]
    alive = valid_LN.clone()
    place = torch.arange(_BLOCK, device=boxes_LN4.device)
    bits = torch.ones_like(place) << place
    for start in range(0, boxes, _BLOCK):
        stop = min(start + _BLOCK, boxes)
        size = stop - start
        # (L, size, N - start)
        overlaps = iou(boxes_LN4[:, start:stop], boxes_LN4[:, start:]) > max_iou
        # The bits of the boxes that each box of the block leaves alive.
        spared = ~(overlaps[:, :, :size].triu(1) * bits[:size]).sum(dim=2)
        word = (alive[:, start:stop] * bits[:size]).sum(dim=1)
        for i in range(size):
            word = torch.where((word & (1 << i)) != 0, word & spared[:, i], word)
        kept = (word[:, None] & bits[:size]) != 0
        later = (overlaps[:, :, size:] & kept[:, :, None]).any(dim=1)
        alive = torch.cat([alive[:, :start], kept, alive[:, stop:] & ~later], dim=1)
    return alive
