"""Convolutions of any stride on the CPU as products of rows of windows.

Such a row is one piece of memory in channels-last maps.

Axes: N images, H x W cells, C input and O output channels, K x K windows, T x U outputs of an
image.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu.native import (
    LANES,
    Context,
    Gradients,
    cells,
    empty_maps,
    register,
    run,
    takes,
    workspace,
)


def fits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `convolve` takes this layer and these maps.

    Windows are square; outputs are multiples of 16, and so are inputs that have a gradient.
    """
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
    # The stem has 3 inputs, images, which have no gradient: only that kernel wants whole panels of
    # inputs.
    whole = conv.out_channels % LANES == 0 and (
        conv.in_channels % LANES == 0 or not x.requires_grad
    )
    return whole and smallest >= conv.kernel_size[0]


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution, computed as the gradient of a convolution's inputs."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        """Shares the parameters of `layer`."""
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            cast(tuple[int, int], layer.kernel_size),
            cast(tuple[int, int], layer.stride),
            cast(tuple[int, int], layer.padding),
            cast(tuple[int, int], layer.output_padding),
            layer.groups,
            layer.bias is not None,
            cast(tuple[int, int], layer.dilation),
            layer.padding_mode,
            device="meta",  # draws no random number and takes no memory
        )
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """torch's numbers but for rounding."""
        if output_size is not None or not self._takes(input):
            return super().forward(input, output_size)
        result = deconvolve(input, self.weight, self.stride[0])
        return result if self.bias is None else result.add_(self.bias[:, None, None])

    def _takes(self, x: Tensor) -> bool:
        plain = (self.padding, self.output_padding, self.dilation, self.groups) == (
            (0, 0),
            (0, 0),
            (1, 1),
            1,
        )
        square = self.kernel_size[0] == self.kernel_size[1] and self.stride[0] == self.stride[1]
        maps = x.dim() == 4 and x.shape[1] == self.in_channels and min(x.shape[2:]) > 0
        whole = not self.in_channels % LANES and not self.out_channels % LANES
        return plain and square and maps and whole and takes(x, self.weight)


def _padded(x_NCHW: Tensor, padding: int) -> Tensor:
    """(N, H + 2 padding, W + 2 padding, C), dense."""
    return F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()


def _inside(padded_NHWC: Tensor, padding: int) -> Tensor:
    """The inverse of `_padded`, as maps."""
    _, height, width, _ = padded_NHWC.shape
    inside = padded_NHWC[:, padding : height - padding, padding : width - padding]
    return inside.contiguous().permute(0, 3, 1, 2)


def _forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return _product(_padded(x, padding), weight, stride)


def _product(x_NHWC: Tensor, weight_OCKK: Tensor, stride: int) -> Tensor:
    outputs, channels, kernel, _ = weight_OCKK.shape
    tall, wide = (_outputs(side, kernel, stride) for side in x_NHWC.shape[1:3])
    in_panels = (
        weight_OCKK.reshape(-1, LANES, channels, kernel, kernel).permute(0, 3, 4, 2, 1).contiguous()
    )
    y = empty_maps(len(x_NHWC), outputs, tall, wide)
    sizes = (*x_NHWC.shape, tall, wide, outputs, kernel, stride)
    run("windows_forward", x_NHWC, in_panels, cells(y), *sizes)
    return y


def _outputs(padded_side: int, kernel: int, stride: int) -> int:
    return (padded_side - kernel) // stride + 1


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
    to_weight = x_NHWC.new_zeros(outputs // LANES, kernel, kernel, channels, LANES)
    room = workspace(gradient_NTUO.numel())
    sizes = (*x_NHWC.shape, *gradient_NTUO.shape[1:], kernel, stride)
    run("windows_weight_gradient", x_NHWC, gradient_NTUO, to_weight, room, *sizes)
    return to_weight.permute(0, 4, 3, 1, 2).reshape(outputs, channels, kernel, kernel)


def _deconvolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    sides = ((side - 1) * stride + weight.shape[2] for side in x.shape[2:])
    y = empty_maps(len(x), weight.shape[1], *sides).zero_()
    _add_input_gradient(cells(x), weight, cells(y), stride)
    return y


def _new_maps(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    maps = like.new_empty(like.shape[0], channels, height, width)
    return maps.contiguous(memory_format=torch.channels_last)


def _keep(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = cast(tuple[int, ...], inputs[2:])


def _backward(ctx: Context, gradient: Tensor) -> Gradients:
    x, weight = ctx.saved_tensors
    stride, padding = ctx.sizes
    of_x, of_weight = ctx.needs_input_grad[:2]
    # One copy for both, if the gradient is not channels last.
    gradient_NTUO, to_x, to_weight = cells(gradient), None, None
    if of_x:
        images, channels, height, width = x.shape
        # Zeros, because windows overlap: each output adds to all cells of its window.
        sides = (height + 2 * padding, width + 2 * padding)
        padded = gradient_NTUO.new_zeros(images, *sides, channels)
        _add_input_gradient(gradient_NTUO, weight, padded, stride)
        to_x = _inside(padded, padding)
    if of_weight:
        to_weight = _weight_gradient(_padded(x, padding), gradient_NTUO, weight.shape[2], stride)
    return to_x, to_weight, None, None


def _backward_of_deconvolution(ctx: Context, gradient: Tensor) -> Gradients:
    x, weight = ctx.saved_tensors
    (stride,) = ctx.sizes
    of_x, of_weight = ctx.needs_input_grad[:2]
    gradient_NTUO, to_x, to_weight = cells(gradient), None, None
    # The inputs and the outputs of the convolution trade places.
    if of_x:
        to_x = _product(gradient_NTUO, weight, stride)
    if of_weight:
        to_weight = _weight_gradient(gradient_NTUO, cells(x), weight.shape[2], stride)
    return to_x, to_weight, None


# conv2d(x, weight, stride=stride, padding=padding), channels last.
# x: (N, C, H, W). weight: (O, C, K, K).
convolve = register(
    "windows(Tensor x, Tensor weight, int stride, int padding) -> Tensor",
    _forward,
    lambda x, weight, stride, padding: _new_maps(
        x,
        weight.shape[0],
        *(_outputs(side + 2 * padding, weight.shape[2], stride) for side in x.shape[2:]),
    ),
    _keep,
    _backward,
)
# conv_transpose2d(x, weight, stride=stride), channels last. x: (N, C, H, W). weight: (C, O, K, K).
deconvolve = register(
    "deconvolution(Tensor x, Tensor weight, int stride) -> Tensor",
    _deconvolve,
    lambda x, weight, stride: _new_maps(
        x, weight.shape[1], *((side - 1) * stride + weight.shape[2] for side in x.shape[2:])
    ),
    _keep,
    _backward_of_deconvolution,
)
