"""Convolutions as torch has them, computed on the CPU in the way that is fastest for their shape.

The numbers are the library's but for rounding. On a GPU the library chooses. Gradients of gradients are the library's
alone: a first backward pass through these has none.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.cpu import native, windows, winograd


class Convolution(nn.Conv2d):
    """3 x 3 at stride 1 by Winograd's algorithm, 1 x 1 as one product, others by windows; the rest as torch has it.

    In evaluation the library's alone, unless `in_evaluation`: what ranks and places boxes there rounds as in other
    implementations, so that one's weights give another's detections to the hundredth of a pixel.
    """

    in_evaluation = False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training or self.in_evaluation) or not self._is_ours(input, weight):
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        result: Tensor
        if _plain(self, 3) and winograd.pays_off(input, weight):
            result = winograd.convolve(input, weight)
        elif _plain(self, 1) and input.is_contiguous(memory_format=torch.channels_last):
            result = _Pointwise.apply(input, weight.flatten(1))
        elif windows.fits(self, input):
            result = windows.convolve(input, weight, self.stride[0], cast(int, self.padding[0]))
        elif self.padding_mode == "zeros" and not isinstance(self.padding, str):
            result = _Library.apply(
                input, weight, self.stride, self.padding, self.dilation, self.groups
            )
        else:
            return cast(Tensor, super()._conv_forward(input, weight, bias))
        return result if bias is None else result.add_(bias[:, None, None])

    def _is_ours(self, x: Tensor, weight: Tensor) -> bool:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            return False  # for the library to take, or to refuse
        return native.takes(x, weight)


class _Pointwise(torch.autograd.Function):
    """A 1 x 1 convolution of channels-last maps."""

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


class _Library(torch.autograd.Function):
    """The library's convolution, but the gradient of its weights always from channels-first copies.

    Of channels-last maps the library takes up to three times as long for it.
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


def take_fast_convolutions(network: nn.Module, in_evaluation: bool = False) -> None:
    """Turns every convolution into a `Convolution`; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Convolution
            cast(Convolution, module).in_evaluation = in_evaluation
        if type(module) is nn.ConvTranspose2d:
            module.__class__ = windows.Deconvolution


def _plain(conv: nn.Conv2d, side: int) -> bool:
    """side x side at stride 1, in one group, whose maps keep their height and width."""
    margin = (side // 2, side // 2)
    given = (
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
    )
    return given == ((side, side), (1, 1), margin, (1, 1), 1, "zeros")
