"""One channel of a 1 x 1 convolution for each RoI, on the CPU.

Axes: R RoIs, C channels, M mask side, P = M x M pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.branches.mask import own_channel_product
from model.cpu import native


class OwnChannelProduct(nn.Module):
    """`model.branches.mask.OwnChannelProduct` with a channels-last gradient."""

    def forward(self, hidden_RCMM: Tensor, weight_RC: Tensor) -> Tensor:
        """(R, M, M)."""
        if not native.takes(hidden_RCMM, weight_RC):
            return own_channel_product(hidden_RCMM, weight_RC)
        own: Tensor = _Product.apply(hidden_RCMM, weight_RC)
        return own


class _Product(torch.autograd.Function):
    """torch's own gradient is channels first: the layers before it would copy the whole of it."""

    @staticmethod
    def forward(ctx: Any, hidden_RCMM: Tensor, weight_RC: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_RCMM, weight_RC)
        return own_channel_product(hidden_RCMM, weight_RC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RMM: Tensor) -> tuple[Tensor, Tensor]:
        hidden_RCMM, weight_RC = ctx.saved_tensors
        to_hidden = (gradient_RMM[..., None] * weight_RC[:, None, None]).permute(0, 3, 1, 2)
        pixels_RPC = hidden_RCMM.permute(0, 2, 3, 1).flatten(1, 2)
        return to_hidden, torch.bmm(gradient_RMM.flatten(1)[:, None], pixels_RPC)[:, 0]
