"""Convolutions on the CPU in training, each in the way that is fastest for its shape.

The numbers are torch's but for rounding. Only torch has gradients of gradients: a second backward
pass raises.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.backbone.networks import FoldedConv2d, geometry
from model.cpu import native, windows, winograd


class Convolution(nn.Conv2d):
    """A convolution by the kernels, in training.

    With `in_evaluation` in evaluation too. Layers that rank and place boxes are torch's there: they
    round as in other implementations, so that one's weights give another's detections to the
    hundredth of a pixel.
    """

    def __init__(self, conv: nn.Conv2d, in_evaluation: bool = False) -> None:
        """Shares the parameters of `conv`."""
        # On the meta device a layer draws no random number and takes no memory.
        super().__init__(**geometry(conv), bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.in_evaluation = in_evaluation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fast = convolve(self, input, weight) if self.training or self.in_evaluation else None
        if fast is None:
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        return fast if bias is None else fast.add_(bias[:, None, None])


class FoldedConvolution(FoldedConv2d):
    """A `FoldedConv2d` by the kernels, in training."""

    def __init__(self, folded: FoldedConv2d) -> None:
        """Shares the parameters and buffers of `folded`."""
        super().__init__(folded, folded.eps)
        for name, buffer in folded.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fast = convolve(self, input, weight) if self.training else None
        if fast is None:
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        return fast if bias is None else fast.add_(bias[:, None, None])


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor | None:
    """The layer without its bias; None if torch is to compute it."""
    if x.dim() != 4 or x.shape[1] != conv.in_channels or not native.takes(x, weight):
        return None  # torch takes it, or refuses it with its own words
    if _is_plain(conv, 3) and winograd.pays_off(x, weight):
        return winograd.convolve(x, weight)
    if _is_plain(conv, 1) and x.is_contiguous(memory_format=torch.channels_last):
        pointwise: Tensor = _Pointwise.apply(x, weight.flatten(1))
        return pointwise
    if windows.fits(conv, x):
        return windows.convolve(x, weight, conv.stride[0], cast(int, conv.padding[0]))
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        torchs: Tensor = _FromCopies.apply(x, weight, *how)
        return torchs
    return None


def _is_plain(conv: nn.Conv2d, side: int) -> bool:
    """side x side at stride 1, in one group, with maps that keep their height and width."""
    margin = (side // 2, side // 2)
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return shape == ((side, side), (1, 1), margin, (1, 1)) and (
        (conv.groups, conv.padding_mode) == (1, "zeros")
    )


class _Pointwise(torch.autograd.Function):
    """A 1 x 1 convolution of channels-last maps: one matrix product."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_OC: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_OC)
        result = native.empty_maps(x_NCHW.shape[0], len(weight_OC), *x_NCHW.shape[2:])
        torch.mm(_as_rows(x_NCHW), weight_OC.T, out=_as_rows(result))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NOHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NCHW, weight_OC = ctx.saved_tensors
        gradient, (of_x, of_weight) = _as_rows(gradient_NOHW), ctx.needs_input_grad
        to_x = native.empty_maps(*x_NCHW.shape) if of_x else None
        if to_x is not None:
            torch.mm(gradient, weight_OC, out=_as_rows(to_x))
        return to_x, gradient.T @ _as_rows(x_NCHW) if of_weight else None


def _as_rows(maps_NCHW: Tensor) -> Tensor:
    """(N H W, C), a view of channels-last maps."""
    return maps_NCHW.permute(0, 2, 3, 1).reshape(-1, maps_NCHW.shape[1])


class _FromCopies(torch.autograd.Function):
    """torch's convolution, but the gradient of its weights always from channels-first copies.

    Of channels-last maps torch takes up to three times as long for that gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight)
        ctx.how = how
        return F.conv2d(x_NCHW, weight, None, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NOHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        rest = (weight, None, stride, padding, dilation, False, (0, 0), groups)
        of_x, of_weight = ctx.needs_input_grad[:2]
        to_x = to_weight = None
        if of_x:
            to_x = torch.ops.aten.convolution_backward(
                gradient_NOHW, x_NCHW, *rest, (True, False, False)
            )[0]
        if of_weight:
            copies = (gradient_NOHW.contiguous(), x_NCHW.contiguous())
            to_weight = torch.ops.aten.convolution_backward(*copies, *rest, (False, True, False))[1]
        return to_x, to_weight, None, None, None, None
