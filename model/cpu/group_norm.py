"""Group norm of channels-last maps on the CPU; torch's copies them first.

Axes: N images, C channels, H x W cells, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cpu.native import (
    Context,
    Gradients,
    cells,
    empty_maps,
    register,
    run,
    takes,
    workspace,
)


class GroupNorm(nn.GroupNorm):
    """torch's numbers but for rounding, in training; in evaluation torch's own."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        """Shares the parameters of `norm`."""
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; torch takes what is no batch of maps."""
        if not self.training or not self.affine or input.dim() != 4:
            return super().forward(input)
        # Wrong channels and a single number per group are errors: torch has the words for them.
        if input.shape[1] != self.num_channels or input[0].numel() == self.num_groups:
            return super().forward(input)
        if not takes(input, self.weight, self.bias):
            return super().forward(input)
        weight, bias = self.weight.contiguous(), self.bias.contiguous()
        return group_norm(input, weight, bias, self.num_groups, self.eps)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised maps, and the mean and 1 / deviation of each group: (N, G, 2)."""
    images, channels, height, width = x.shape
    y, moments = empty_maps(*x.shape), x.new_empty(images, groups, 2)
    tensors = (cells(x), weight, bias, cells(y), moments, workspace(4 * images * channels))
    run("group_norm_forward", *tensors, images, height * width, channels, groups, eps)
    return y, moments


def _fake(
    x: Tensor, _weight: Tensor, _bias: Tensor, groups: int, *_: float
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(x.shape[0], groups, 2)


def _keep(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Context, gradient: Tensor, of_moments: Tensor) -> Gradients:  # noqa: ARG001
    x, weight, moments = ctx.saved_tensors
    images, channels, height, width = x.shape
    # What each image adds to the gradients of weight and bias; summed here, in an order that
    # threads do not change.
    to_x, shares = empty_maps(*x.shape), x.new_empty(2, images, channels)
    room = workspace(8 * images * channels)
    tensors = (cells(gradient), cells(x), weight, moments, cells(to_x), shares, room)
    run("group_norm_backward", *tensors, images, height * width, channels, moments.shape[1])
    to_weight, to_bias = shares.sum(1)
    return to_x, to_weight, to_bias, None, None


group_norm = register(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _keep,
    _backward,
)
