"""Convolutions of any stride on the CPU as products of rows of windows, which lie in one piece in channels-last maps.

Axes: N images, H x W cells, C input and O output channels, K x K windows, T x U outputs of an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.cpu.native import LANES, cells, empty_maps, run, takes, workspace


def fits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Square windows, multiples of 16 outputs, and of 16 inputs where these have a gradient."""
    if (
        isinstance(conv.padding, str)
        or conv.padding_mode != "zeros"
        or conv.groups != 1
        or conv.dilation != (1, 1)
    ):
        return False
    if any(pair[0] != pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding)):
        return False
    smallest = min(x.shape[2:]) + 2 * conv.padding[0]
    whole = conv.out_channels % LANES == 0 and (
        conv.in_channels % LANES == 0 or not x.requires_grad
    )
    return whole and smallest >= conv.kernel_size[0]


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """conv2d(x, weight, stride=stride, padding=padding), channels last. x: (N, C, H, W). weight: (O, C, K, K)."""
    y: Tensor = _Windows.apply(x, weight, stride, padding)
    return y


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_OCKK: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_OCKK)
        ctx.how = stride, padding
        return _convolve(_padded(x_NCHW, padding), weight_OCKK, stride)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_NOTU: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_NCHW, weight_OCKK = ctx.saved_tensors
        stride, padding = ctx.how
        of_x, of_weight = ctx.needs_input_grad[:2]
        gradient, to_x, to_weight = cells(gradient_NOTU), None, None
        if of_x:
            images, channels, height, width = x_NCHW.shape
            padded = gradient.new_zeros(images, height + 2 * padding, width + 2 * padding, channels)
            _add_input_gradient(gradient, weight_OCKK, padded, stride)
            to_x = _inside(padded, padding)
        if of_weight:
            to_weight = _weight_gradient(
                _padded(x_NCHW, padding), gradient, weight_OCKK.shape[2], stride
            )
        return to_x, to_weight, None, None


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution: the gradient of a convolution's inputs, computed as such."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or not self._is_ours(input):
            return super().forward(input, output_size)
        result: Tensor = _Deconvolution.apply(input, self.weight, self.stride[0])
        return result if self.bias is None else result.add_(self.bias[:, None, None])

    def _is_ours(self, x: Tensor) -> bool:
        given = (self.padding, self.output_padding, self.dilation, self.groups)
        plain = given == ((0, 0), (0, 0), (1, 1), 1) and self.kernel_size[0] == self.kernel_size[1]
        whole = (
            plain
            and self.stride[0] == self.stride[1]
            and x.dim() == 4
            and x.shape[1] == self.in_channels
        )
        whole = whole and min(x.shape[2:]) > 0
        return (
            whole
            and not self.in_channels % LANES
            and not self.out_channels % LANES
            and takes(x, self.weight)
        )


class _Deconvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_COKK: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_COKK)
        ctx.stride = stride
        sides = ((side - 1) * stride + weight_COKK.shape[2] for side in x_NCHW.shape[2:])
        y = empty_maps(len(x_NCHW), weight_COKK.shape[1], *sides).zero_()
        _add_input_gradient(cells(x_NCHW), weight_COKK, cells(y), stride)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NOTU: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NCHW, weight_COKK = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        gradient, to_x, to_weight = cells(gradient_NOTU), None, None
        if of_x:
            to_x = _convolve(gradient, weight_COKK, ctx.stride)
        if of_weight:
            to_weight = _weight_gradient(gradient, cells(x_NCHW), weight_COKK.shape[2], ctx.stride)
        return to_x, to_weight, None


def _padded(x_NCHW: Tensor, padding: int) -> Tensor:
    """(N, H + 2 padding, W + 2 padding, C), dense."""
    return F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()


def _inside(padded_NHWC: Tensor, padding: int) -> Tensor:
    """The inverse of `_padded`, as maps."""
    _, height, width, _ = padded_NHWC.shape
    inside = padded_NHWC[:, padding : height - padding, padding : width - padding]
    return inside.contiguous().permute(0, 3, 1, 2)


def _convolve(x_NHWC: Tensor, weight_OCKK: Tensor, stride: int) -> Tensor:
    outputs, channels, kernel, _ = weight_OCKK.shape
    tall, wide = ((side - kernel) // stride + 1 for side in x_NHWC.shape[1:3])
    in_panels = (
        weight_OCKK.reshape(-1, LANES, channels, kernel, kernel).permute(0, 3, 4, 2, 1).contiguous()
    )
    y = empty_maps(len(x_NHWC), outputs, tall, wide)
    run(
        "windows_forward",
        x_NHWC,
        in_panels,
        cells(y),
        *x_NHWC.shape,
        tall,
        wide,
        outputs,
        kernel,
        stride,
    )
    return y


def _add_input_gradient(
    gradient_NTUO: Tensor, weight_OCKK: Tensor, to_x_NHWC: Tensor, stride: int
) -> None:
    in_panels = (
        torch.unflatten(weight_OCKK.permute(2, 3, 1, 0), 2, (-1, LANES))
        .transpose(3, 4)
        .contiguous()
    )
    sizes = (*to_x_NHWC.shape, *gradient_NTUO.shape[1:], weight_OCKK.shape[2], stride)
    run("windows_input_gradient", gradient_NTUO, in_panels, to_x_NHWC, *sizes)


def _weight_gradient(x_NHWC: Tensor, gradient_NTUO: Tensor, kernel: int, stride: int) -> Tensor:
    outputs, channels = gradient_NTUO.shape[3], x_NHWC.shape[3]
    weight = x_NHWC.new_zeros(outputs // LANES, kernel, kernel, channels, LANES)
    sizes = (*x_NHWC.shape, *gradient_NTUO.shape[1:], kernel, stride)
    run(
        "windows_weight_gradient",
        x_NHWC,
        gradient_NTUO,
        weight,
        workspace(gradient_NTUO.numel()),
        *sizes,
    )
    return weight.permute(0, 4, 3, 1, 2).reshape(outputs, channels, kernel, kernel)
