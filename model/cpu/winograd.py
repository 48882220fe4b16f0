"""3 x 3 convolutions of stride 1 on the CPU with a quarter of the multiplications (Lavin and Gray, arXiv 1509.09308).

F(4 x 4, 3 x 3): a tile of 4 x 4 outputs is the transform of products of 6 x 6 transformed inputs and weights, which
over all channels are 36 matrix products (native.c). Interpolation points 0, +-sqrt(1/2), +-sqrt(2) and infinity, chosen
for small rounding errors. These scale with the largest number of a tile, and what is not finite spreads over its tile.
CPU libraries have no such kernel for fp32 without AVX-512; GPUs choose their own.

Axes: N images, H x W cells, C input and O output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.cpu.native import LANES, cells, empty_maps, run, workspace

_TILE, _POINTS = 4, 36
_BAND_TILES = 36  # worked on at a time: their transforms stay in a cache, and the weights' are read once for all
_MAX_CHANNELS = 4096  # that native.c has zeros for
_MIN_TILES = 8  # with fewer, transforming the weights costs more than is saved


def pays_off(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` takes these and is faster than the library. x: (N, C, H, W). weight: (O, C, 3, 3)."""
    whole = all(
        channels % LANES == 0 and channels <= _MAX_CHANNELS for channels in weight.shape[:2]
    )
    return whole and _num_tiles(x) >= _MIN_TILES


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1), channels last. x: (N, C, H, W). weight: (O, C, 3, 3). Multiples of 16 channels."""
    y: Tensor = _Winograd.apply(x, weight)
    return y


class _Winograd(torch.autograd.Function):
    """Keeps its inputs for the backward pass, not their transforms: those are 2.25 times as large, and made quickly."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_OC33: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_OC33)
        return _convolve(x_NCHW, weight_OC33, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NOHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NCHW, weight_OC33 = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        to_x = _convolve(gradient_NOHW, weight_OC33, transposed=True) if of_x else None
        return to_x, _weight_gradient(x_NCHW, gradient_NOHW) if of_weight else None


def _convolve(x_NCHW: Tensor, weight_OC33: Tensor, transposed: bool) -> Tensor:
    """Transposed: the gradient of the inputs from one of the outputs, a convolution by the weights turned round."""
    outputs = weight_OC33.shape[1 if transposed else 0]
    y = empty_maps(x_NCHW.shape[0], outputs, *x_NCHW.shape[2:])
    weight = weight_OC33.contiguous()
    run(
        "winograd_forward",
        cells(x_NCHW),
        weight,
        transposed,
        cells(y),
        *_sizes_and_workspace(x_NCHW, outputs),
    )
    return y


def _weight_gradient(x_NCHW: Tensor, gradient_NOHW: Tensor) -> Tensor:
    outputs, channels = gradient_NOHW.shape[1], x_NCHW.shape[1]
    weight = x_NCHW.new_empty(outputs, channels, 3, 3)
    given = (cells(x_NCHW), cells(gradient_NOHW), weight)
    run("winograd_weight_gradient", *given, *_sizes_and_workspace(x_NCHW, outputs))
    return weight


def _num_tiles(x_NCHW: Tensor) -> int:
    images, _, height, width = x_NCHW.shape
    return images * -(-height // _TILE) * -(-width // _TILE)


def _sizes_and_workspace(x_NCHW: Tensor, outputs: int) -> tuple[Tensor | int, ...]:
    """With the room that native.c asks for, and how many tiles a band has."""
    images, channels, height, width = x_NCHW.shape
    tiles = _num_tiles(x_NCHW)
    band = min(_BAND_TILES, tiles)
    factors = (channels + 1) * outputs if tiles > band else 0
    room = workspace(_POINTS * (factors + (band + 1) * (channels + outputs)))
    return images, height, width, channels, outputs, room, band
