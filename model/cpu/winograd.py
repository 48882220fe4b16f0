"""3 x 3 convolutions of stride 1 on the CPU with a quarter of the multiplications.

The algorithm is F(4 x 4, 3 x 3) of Lavin and Gray (arXiv 1509.09308): a tile of 4 x 4 outputs is
the transform of products of 6 x 6 transformed inputs and weights, which over all channels are 36
matrix products (native.c). The interpolation points 0, +-sqrt(1/2), +-sqrt(2) and infinity keep
rounding errors small. These errors scale with the largest number of a tile, and a number that is
not finite spreads over its tile. CPU libraries have no such kernel for fp32 without AVX-512; GPUs
choose their own.

Axes: N images, H x W cells, C input and O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.cpu.native import (
    LANES,
    Context,
    Gradients,
    cells,
    empty_maps,
    register,
    run,
    workspace,
)

_TILE, _POINTS = 4, 36
# Tiles of one band: their transforms stay in a cache, and the weights are read once for all of
# them.
_BAND_TILES = 36
_MAX_CHANNELS = 4096  # native.c has so many zeros for the cells outside
_MIN_TILES = 8  # with fewer, transforming the weights costs more than it saves


def pays_off(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` takes these and is faster than torch.

    x: (N, C, H, W). weight: (O, C, 3, 3).
    """
    whole = all(
        channels % LANES == 0 and channels <= _MAX_CHANNELS for channels in weight.shape[:2]
    )
    return whole and _num_tiles(x) >= _MIN_TILES


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight, transposed=False)


def _product(x_NCHW: Tensor, weight_OC33: Tensor, transposed: bool) -> Tensor:
    """The convolution; `transposed` takes a gradient of its outputs to the gradient of its inputs.

    That is a convolution too, by the weights turned by 180 degrees.
    """
    outputs = weight_OC33.shape[1 if transposed else 0]
    y = empty_maps(x_NCHW.shape[0], outputs, *x_NCHW.shape[2:])
    weight = weight_OC33.contiguous()
    sizes = _sizes_and_workspace(x_NCHW, outputs)
    run("winograd_forward", cells(x_NCHW), weight, transposed, cells(y), *sizes)
    return y


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    outputs, channels = gradient.shape[1], x.shape[1]
    to_weight = x.new_empty(outputs, channels, 3, 3)
    sizes = _sizes_and_workspace(x, outputs)
    run("winograd_weight_gradient", cells(x), cells(gradient), to_weight, *sizes)
    return to_weight


def _num_tiles(x_NCHW: Tensor) -> int:
    images, _, height, width = x_NCHW.shape
    return images * -(-height // _TILE) * -(-width // _TILE)


def _sizes_and_workspace(x_NCHW: Tensor, outputs: int) -> tuple[Tensor | int, ...]:
    """Sizes, the room that native.c needs, and how many tiles a band has."""
    images, channels, height, width = x_NCHW.shape
    tiles = _num_tiles(x_NCHW)
    band = min(_BAND_TILES, tiles)
    # A single band makes the weights' factors where it uses them; several bands share one copy.
    factors = (channels + 1) * outputs if tiles > band else 0
    room = workspace(_POINTS * (factors + (band + 1) * (channels + outputs)))
    return images, height, width, channels, outputs, room, band


def _maps_like(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _keep(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    # The inputs and not their transforms: those are 2.25 times as large, and made quickly.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Context, gradient: Tensor) -> Gradients:
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad
    to_x = _product(gradient, weight, transposed=True) if of_x else None
    return to_x, _weight_gradient(x, gradient) if of_weight else None


# conv2d(x, weight, padding=1), channels last. x: (N, C, H, W). weight: (O, C, 3, 3). Both have
# multiples of 16 channels.
convolve = register(
    "winograd(Tensor x, Tensor weight) -> Tensor",
    _forward,
    lambda x, weight: _maps_like(x, weight.shape[0]),
    _keep,
    _backward,
)
