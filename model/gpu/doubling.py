"""Maps at twice their side on a GPU, with gradients that repeat to the bit.

The backward pass of torch's interpolation adds atomically, in an order that changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Doubling(nn.Module):
    """`model.branches.keypoint.Doubling` by sums of neighbours, in float32 under autocast too."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, 2 H, 2 W) of maps (B, C, H, W)."""
        return _doubled(_doubled(maps.float(), 2), 3).to(maps.dtype)


def _doubled(maps: Tensor, axis: int) -> Tensor:
    """Points at a quarter and at three quarters of each cell; the border repeats."""
    last = maps.shape[axis] - 1
    before = torch.cat([maps.narrow(axis, 0, 1), maps.narrow(axis, 0, last)], dim=axis)
    after = torch.cat([maps.narrow(axis, 1, last), maps.narrow(axis, last, 1)], dim=axis)
    pair = torch.stack([0.25 * before + 0.75 * maps, 0.75 * maps + 0.25 * after], dim=axis + 1)
    return pair.flatten(axis, axis + 1)
