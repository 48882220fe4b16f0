"""Non-maximum suppression on the CPU, of many lists at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cpu.native import register, run, takes, workspace
from model.rpn.nms import nms


class ListSuppression(nn.Module):
    """`model.rpn.nms.Suppression` by our kernel, for what it takes."""

    def __init__(self, max_iou: float) -> None:
        super().__init__()
        self.max_iou = max_iou

    def forward(self, boxes_LN4: Tensor, valid_LN: Tensor) -> Tensor:
        """bool (L, N), as `nms`."""
        if takes(boxes_LN4) and valid_LN.dtype == torch.bool:
            return suppress(boxes_LN4.contiguous(), valid_LN.contiguous(), self.max_iou)
        return nms(boxes_LN4, valid_LN, self.max_iou)


def _suppress(boxes: Tensor, valid: Tensor, max_iou: float) -> Tensor:
    keep, room = valid.new_empty(valid.shape), workspace(6 * valid.numel())
    run("nms", boxes, valid, keep, room, *valid.shape, max_iou)
    return keep


def _fake(_boxes: Tensor, valid: Tensor, _max_iou: float) -> Tensor:
    return torch.empty_like(valid)


suppress = register(
    "nms(Tensor boxes, Tensor valid, float max_iou) -> Tensor",
    _suppress,
    _fake,
)
