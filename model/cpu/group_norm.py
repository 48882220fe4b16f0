"""Group norm of channels-last maps on the CPU, where torch's copies them first.

Axes: N images, C channels, H x W cells, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.cpu.native import cells, empty_maps, run, takes, workspace


class GroupNorm(nn.GroupNorm):
    """torch's numbers but for rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            not self.training
            or not self.affine
            or input.dim() != 4
            or not takes(input, self.weight, self.bias)
        ):
            return super().forward(input)
        if input.shape[1] != self.num_channels or input[0].numel() == self.num_groups:
            return super().forward(input)  # for torch to refuse, or to take
        result: Tensor = _GroupNorm.apply(
            input, self.weight.contiguous(), self.bias.contiguous(), self.num_groups, self.eps
        )
        return result


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float
    ) -> Tensor:
        images, channels, height, width = x_NCHW.shape
        y, moments = empty_maps(*x_NCHW.shape), x_NCHW.new_empty(images, groups, 2)
        sizes = (images, height * width, channels, groups)
        run(
            "group_norm_forward",
            cells(x_NCHW),
            weight_C,
            bias_C,
            cells(y),
            moments,
            workspace(4 * images * channels),
            *sizes,
            eps,
        )
        ctx.save_for_backward(x_NCHW, weight_C, moments)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C, moments = ctx.saved_tensors
        images, _, channels, _ = ctx.sizes
        to_x = empty_maps(*x_NCHW.shape)
        shares, room = x_NCHW.new_empty(2, images, channels), workspace(8 * images * channels)
        given = (cells(gradient_NCHW), cells(x_NCHW), weight_C, moments)
        run("group_norm_backward", *given, cells(to_x), shares, room, *ctx.sizes)
        return to_x, *shares.sum(1), None, None


def take_fast_norms(network: nn.Module) -> None:
    """Turns every group norm into a `GroupNorm`; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
