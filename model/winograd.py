"""3 x 3 convolutions of stride 1 on the CPU with a quarter of the multiplications (Lavin and Gray, arXiv 1509.09308).

F(4 x 4, 3 x 3): a tile of 4 x 4 outputs is the transform of products of 6 x 6 transformed inputs and weights, which
over all channels are 36 matrix products. Interpolation points 0, +-A, +-B and infinity, with A and B chosen for small
rounding errors. These scale with the largest number of a tile, and what is not finite spreads over its tile. CPU
libraries have no such kernel for fp32 without AVX-512; GPUs choose their own.

Axes: N images, H x W cells, C input and O output channels, K tile rows of a band, L tiles in a row, T = N K L tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4  # outputs of a tile's side; inputs and products of a side: 6
_A, _B = 0.5**0.5, 2.0**0.5  # A B = 1
_AA, _BB = 0.5, 2.0
_BAND_NUMBERS = 2**21  # transformed numbers of a band that is worked on at a time: about the size of a cache
_MIN_CHANNELS, _MIN_TILES = 128, 96  # with fewer, the transforms cost more than they save


def pays_off(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` is faster than the library here. x: (N, C, H, W). weight: (O, C, 3, 3)."""
    tiles = x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    return min(weight.shape[:2]) >= _MIN_CHANNELS and tiles >= _MIN_TILES


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1), channels last. x: (N, C, H, W). weight: (O, C, 3, 3)."""
    y: Tensor = _Winograd.apply(x, weight)
    return y


class _Winograd(torch.autograd.Function):
    """Keeps its inputs for the backward pass, not their transforms: those are 2.25 times as large, and made quickly."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_OC33: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_OC33)
        x, out_channels = x_NCHW.permute(0, 2, 3, 1), weight_OC33.shape[0]
        weight = _weight_products(weight_OC33)
        result = empty_maps(x_NCHW, out_channels)
        y = result.permute(0, 2, 3, 1)
        for images, rows in _bands(x, out_channels):
            _write_outputs(torch.bmm(_inputs(x[images], rows), weight), y[images], rows)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NOHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NCHW, weight_OC33 = ctx.saved_tensors
        x, gradient = x_NCHW.permute(0, 2, 3, 1), gradient_NOHW.permute(0, 2, 3, 1)
        out_channels, channels = weight_OC33.shape[:2]
        of_x, of_weight = ctx.needs_input_grad
        weight = _weight_products(weight_OC33).transpose(1, 2)
        to_weight = x.new_zeros(36 if of_weight else 0, channels, out_channels)
        to_x = x.new_zeros(len(x) if of_x else 0, _padded(x.shape[1]), _padded(x.shape[2]), channels)
        for images, rows in _bands(x, out_channels):
            products = _gradients(gradient[images], rows)
            if of_weight:
                to_weight.baddbmm_(_inputs(x[images], rows).transpose(1, 2), products)
            if of_x:
                _add_input_gradients(torch.bmm(products, weight), to_x[images], rows)
        inner = to_x[:, 1 : x.shape[1] + 1, 1 : x.shape[2] + 1].permute(0, 3, 1, 2)
        return inner if of_x else None, _weight_gradient(to_weight) if of_weight else None


def empty_maps(like_NCHW: Tensor, channels: int) -> Tensor:
    """(N, channels, H, W), channels last. No view of anything: a residual block adds to it in place."""
    shape = (like_NCHW.shape[0], channels, *like_NCHW.shape[2:])
    return torch.empty(shape, dtype=like_NCHW.dtype, device=like_NCHW.device, memory_format=torch.channels_last)


# --- bands ----------------------------------------------------------------------------------------------------------


def _bands(x_NHWC: Tensor, out_channels: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of tile rows that cover `x`: some images whole, or some rows of one image."""
    images, height, width, channels = x_NHWC.shape
    in_height, in_row = -(-height // TILE), -(-width // TILE)
    most = max(_BAND_NUMBERS // (36 * max(channels, out_channels) * in_row), 1)
    together, rows = max(most // in_height, 1), min(most, in_height)
    for image in range(0, images, together):
        for row in range(0, in_height, rows):
            yield slice(image, min(image + together, images)), slice(row, min(row + rows, in_height))


def _padded(side: int) -> int:
    return TILE * -(-side // TILE) + 2


# --- transforms of the activations: separable, first along the rows, then along the columns ---------------------------


def _inputs(x_NHWC: Tensor, rows: slice) -> Tensor:
    """(36, T, C) of a band."""
    images, height, width, channels = x_NHWC.shape
    above, below = TILE * rows.start - 1, TILE * rows.stop + 1
    margins = (0, 0, 1, _padded(width) - width - 1, max(-above, 0), max(below - height, 0))
    band = F.pad(x_NHWC[:, max(above, 0) : min(below, height)], margins)
    tall = x_NHWC.new_empty(6, images, rows.stop - rows.start, band.shape[2], channels)
    _interpolate([band[:, i : band.shape[1] - 5 + i : TILE] for i in range(6)], list(tall))
    tiles = x_NHWC.new_empty(6, *tall.shape[:3], -(-width // TILE), channels)
    _interpolate([tall[:, :, :, j : band.shape[2] - 5 + j : TILE] for j in range(6)], list(tiles))
    return tiles.view(36, -1, channels)


def _write_outputs(products_PTO: Tensor, into_NHWO: Tensor, rows: slice) -> None:
    images, _, width, channels = into_NHWO.shape
    in_row = -(-width // TILE)
    products = products_PTO.view(6, 6, images, rows.stop - rows.start, in_row, channels)
    wide = products.new_empty(TILE, *products.shape[1:])
    _evaluate(list(products), list(wide))
    cells = products.new_empty(TILE, TILE, *products.shape[2:])
    for j in range(TILE):
        _evaluate(list(wide[j]), list(cells[j]))
    band = into_NHWO[:, TILE * rows.start : TILE * rows.stop]
    for i in range(TILE):
        for j in range(TILE):
            place = band[:, i::TILE, j::TILE]
            place.copy_(cells[j, i, :, : place.shape[1], : place.shape[2]])


def _gradients(gradient_NHWO: Tensor, rows: slice) -> Tensor:
    """(36, T, O): the gradient of a band's products. The transpose of `_write_outputs`."""
    images, _, width, channels = gradient_NHWO.shape
    band = gradient_NHWO[:, TILE * rows.start : TILE * rows.stop]
    tile_rows = rows.stop - rows.start
    band = F.pad(band, (0, 0, 0, _padded(width) - 2 - width, 0, TILE * tile_rows - band.shape[1]))
    tall = band.new_empty(6, images, tile_rows, band.shape[2], channels)
    _spread([band[:, i::TILE] for i in range(TILE)], list(tall))
    products = band.new_empty(6, *tall.shape[:3], -(-width // TILE), channels)
    _spread([tall[:, :, :, j::TILE] for j in range(TILE)], list(products))
    return products.view(36, -1, channels)


def _add_input_gradients(tiles_PTC: Tensor, into_NHWC: Tensor, rows: slice) -> None:
    """Adds a band's gradients where its tiles overlap. `into` has the margin. The transpose of `_inputs`."""
    images, _, width, channels = into_NHWC.shape
    tiles = tiles_PTC.view(6, 6, images, rows.stop - rows.start, width // TILE, channels)
    tall = tiles.new_empty(6, *tiles.shape[2:4], width, channels)
    tall[:, :, :, width - 2 :] = 0
    places = [tall[:, :, :, j : width - 5 + j : TILE] for j in range(6)]
    columns = [*places[:TILE], *tiles.new_empty(2, *tiles.shape[1:])]
    _collect(list(tiles), columns)
    for place, column in zip(places[TILE:], columns[TILE:], strict=True):
        place += column
    cells = tall.new_empty(tall.shape)
    _collect(list(tall), list(cells))
    band = into_NHWC[:, TILE * rows.start : TILE * rows.stop + 2]
    for i in range(6):
        band[:, i : band.shape[1] - 5 + i : TILE] += cells[i]


# --- the one-dimensional transforms, written out for few passes over the numbers --------------------------------------


def _interpolate(d: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Six inputs to six factors: at 0, A, -A, B, -B, infinity."""
    for place, root, other in ((1, _A, _BB), (3, _B, _AA)):
        even, odd = torch.sub(d[4], d[2], alpha=other), torch.sub(d[3], d[1], alpha=other)
        torch.add(even, odd, alpha=root, out=into[place])
        torch.sub(even, odd, alpha=root, out=into[place + 1])
    torch.add(d[0], d[4], out=into[0]).sub_(d[2], alpha=_AA + _BB)
    torch.add(d[1], d[5], out=into[5]).sub_(d[3], alpha=_AA + _BB)


def _collect(v: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """The transpose of `_interpolate`."""
    even_a, odd_a, even_b, odd_b = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    into[0].copy_(v[0])
    into[5].copy_(v[5])
    torch.sub(v[5], odd_a, alpha=_A * _BB, out=into[1]).sub_(odd_b, alpha=_B * _AA)
    torch.mul(v[0], -(_AA + _BB), out=into[2]).sub_(even_a, alpha=_BB).sub_(even_b, alpha=_AA)
    torch.mul(v[5], -(_AA + _BB), out=into[3]).add_(odd_a, alpha=_A).add_(odd_b, alpha=_B)
    torch.add(v[0], even_a, out=into[4]).add_(even_b)


def _evaluate(m: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Six products to four outputs."""
    even_a, odd_a, even_b, odd_b = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(m[0], even_a, out=into[0]).add_(even_b)
    torch.mul(odd_a, _A, out=into[1]).add_(odd_b, alpha=_B)
    torch.mul(even_a, _AA, out=into[2]).add_(even_b, alpha=_BB)
    torch.add(m[5], odd_a, alpha=_A * _AA, out=into[3]).add_(odd_b, alpha=_B * _BB)


def _spread(y: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """The transpose of `_evaluate`."""
    into[0].copy_(y[0])
    into[5].copy_(y[3])
    for place, root, square in ((1, _A, _AA), (3, _B, _BB)):
        even, odd = torch.add(y[0], y[2], alpha=square), torch.add(y[1], y[3], alpha=square)
        torch.add(even, odd, alpha=root, out=into[place])
        torch.sub(even, odd, alpha=root, out=into[place + 1])


# --- transforms of the weights ----------------------------------------------------------------------------------------


def _weight_transform(like: Tensor) -> Tensor:
    """(36, 9): both dimensions at once, columns first, as the activations have it."""
    rows = [[1.0, 0.0, 0.0]]  # over A^2 B^2 = 1
    for root, square, other in ((_A, _AA, _BB), (_B, _BB, _AA)):
        scale = 1 / (2 * square * (square - other))
        rows += [[scale, sign * root * scale, square * scale] for sign in (1, -1)]
    one = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device=like.device)
    return torch.kron(one, one).to(like.dtype)


def _weight_products(weight_OC33: Tensor) -> Tensor:
    """(36, C, O)."""
    columns_first = weight_OC33.permute(3, 2, 1, 0)
    return torch.unflatten(
        _weight_transform(weight_OC33) @ columns_first.reshape(9, -1), 1, tuple(columns_first.shape[2:])
    )


def _weight_gradient(products_PCO: Tensor) -> Tensor:
    """(O, C, 3, 3). The transpose of `_weight_products`."""
    gradient = _weight_transform(products_PCO).T @ products_PCO.flatten(1)
    return gradient.view(3, 3, *products_PCO.shape[1:]).permute(3, 2, 1, 0)
