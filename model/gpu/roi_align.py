"""RoIAlign of all levels on a GPU: one launch forward, two backward, sums in a fixed order.

The forward pass reads every RoI from the map of its level. The backward pass gathers: a program
owns a tile of cells, goes through the RoIs that touch it in their order and writes its cells once.
So no gradient is added atomically, the result repeats to the bit, and no sum lies in memory in
float32. On one axis a bin is a weighted sum of cells, and the weights of a tile's cells in all bins
are the product of those of rows and columns: a matrix product with the gradient of the crop.

Maps are read and written channels last. Sums are float32; crops and gradients have the maps' type.

Axes: B images, C channels, R RoIs, S side of the crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.roi.operations import (
    CANONICAL_LOG_STRIDE,
    CANONICAL_SIDE_PX,
    Align,
    RoIOperation,
)

MOST_LEVELS = 5
# Blocks: the fastest of those that benchmarks/roi_align.py tries, on an H200.
_BINS, _CHANNELS, _CROP_WARPS = 8, 256, 4  # a forward program's
_TOUCHED_BINS, _TOUCHED_CHANNELS = 16, 256  # of a gradient that is read at a time
# A backward program's: cells of a side, channels of 16 bits, bins of one matrix product.
_TILE, _TILE_CHANNELS, _PRODUCT, _GATHER_WARPS = 8, 256, 64, 4
_ROIS = 128  # that one program assigns
# Sizes of a canvas: a kernel compiled for some of their divisors would be compiled anew in the
# middle of training.
_SIZES = [f"{name}_{level}" for name in ("height", "width", "tile") for level in range(MOST_LEVELS)]
_SIZES += ["num_tiles", "num_rois"]

T = TypeVar("T")


class _Context(Protocol):
    """What the forward pass keeps for the backward pass; torch makes it."""

    saved_tensors: tuple[Tensor, ...]
    sizes: tuple[int, list[int], list[int], list[int], int, bool]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class LevelAlign(RoIOperation):
    """`RoIOperation` by our kernels, of an `Align` whose samples are fixed and averaged."""

    crop: Align

    def __init__(self, crop: Align, side: int, strides: Sequence[int]) -> None:
        super().__init__(crop, side, strides)
        # The crops' memory format: a convolution reads channels last, a linear layer does not.
        self.channels_last = True

    def forward(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """As `RoIOperation`. Under autocast the crops keep the maps' type."""
        return align_levels(
            maps,
            *assigned(rois_R5.detach(), self.strides),
            self.strides,
            self.side,
            self.crop.samples,
            self.crop.aligned,
            self.channels_last,
        )


def by_kernels(operation: RoIOperation) -> LevelAlign | None:
    """The same operation by our kernels, or None if they do not compute it."""
    crop = operation.crop
    if type(crop) is not Align or crop.reduce != "mean" or crop.samples == 0:
        return None
    if len(operation.strides) > MOST_LEVELS:
        return None
    return LevelAlign(crop, operation.side, operation.strides)


def trial() -> bool:
    """Whether crops and gradients are torch's, of 70 RoIs on four maps in bfloat16.

    The constants are those of a box head on a feature pyramid, which compiles nothing again.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(70, 2, 2, generator=generator) * 300
    image = torch.arange(70)[:, None] % 2
    rois = torch.cat([image, sizes[:, 0] - 20, sizes.sum(dim=1) - 20], dim=1)
    operation = RoIOperation(Align(2, "mean", aligned=True), 7, (4, 8, 16, 32))
    kernels = by_kernels(operation)
    assert kernels is not None
    kernels.channels_last = False
    maps = [
        torch.randn(2, 256, 400 // stride, 600 // stride, generator=generator)
        for stride in operation.strides
    ]
    upstream = torch.randn(70, 256, 7, 7, generator=generator)
    found = _crops_and_gradients(kernels, maps, rois, upstream, torch.bfloat16)
    wanted = _crops_and_gradients(operation, maps, rois, upstream, torch.float32)
    return all(
        torch.allclose(one.float(), other, rtol=0.05, atol=0.05)
        for one, other in zip(found, wanted, strict=True)
    )


def _crops_and_gradients(
    operation: RoIOperation,
    maps: Sequence[Tensor],
    rois_R5: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    on_gpu = [m.to("cuda", torch.bfloat16).to(dtype).requires_grad_() for m in maps]
    crops = operation(on_gpu, rois_R5.cuda())
    return [crops, *torch.autograd.grad(crops, on_gpu, upstream.cuda().bfloat16().to(dtype))]


def assigned(rois_R5: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The RoIs, zero for what is not finite, and their levels as `assign_levels` has them, int32.

    One launch for what takes torch 17.
    """
    finite, levels = torch.ops.maskray.assign_levels(rois_R5, strides)
    return finite, levels


def _assigned(rois_R5: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    rois_R5 = rois_R5.contiguous()
    finite, levels = _fake_assigned(rois_R5, strides)
    if len(rois_R5):
        # The side, in canonical sides, from which a box belongs to the second level.
        second = 2.0 ** (strides[0].bit_length() - CANONICAL_LOG_STRIDE)
        _assign[(triton.cdiv(len(rois_R5), _ROIS),)](
            rois_R5,
            finite,
            levels,
            len(rois_R5),
            CANONICAL_SIDE_PX,
            second,
            len(strides),
            _ROIS,
            enable_fp_fusion=False,
        )
    return finite, levels


def _fake_assigned(rois_R5: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(rois_R5), rois_R5.new_empty(rois_R5.shape[0], dtype=torch.int32)


def align_levels(
    maps: Sequence[Tensor],
    rois_R5: Tensor,
    levels_R: Tensor,
    strides: Sequence[int],
    side: int,
    samples: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    """(R, C, S, S): each RoI from the map (B, C, H_l, W_l) of its level.

    levels_R: int32. channels_last: the memory format of the crops.
    """
    crops: Tensor = torch.ops.maskray.align_levels(
        list(maps), rois_R5, levels_R, strides, side, samples, aligned, channels_last
    )
    return crops


def _forward(
    maps: Sequence[Tensor],
    rois_R5: Tensor,
    levels_R: Tensor,
    strides: Sequence[int],
    side: int,
    samples: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    crops = _fake(maps, rois_R5, levels_R, strides, side, samples, aligned, channels_last)
    channels = crops.shape[1]
    if crops.numel():
        blocks = triton.cdiv(side * side, _BINS) * triton.cdiv(channels, _CHANNELS)
        _crop[(len(rois_R5) * blocks,)](
            *of_levels([_channels_last(features) for features in maps]),
            *of_levels([features.shape[2] for features in maps]),
            *of_levels([features.shape[3] for features in maps]),
            *of_levels([1 / stride for stride in strides]),
            rois_R5.contiguous(),
            levels_R,
            crops,
            *_steps(channels, side, channels_last),
            channels,
            side,
            samples,
            aligned,
            _BINS,
            _CHANNELS,
            num_warps=_CROP_WARPS,
            enable_fp_fusion=True,
        )
    return crops


def _fake(
    maps: Sequence[Tensor],
    rois_R5: Tensor,
    levels_R: Tensor,  # noqa: ARG001
    strides: Sequence[int],  # noqa: ARG001
    side: int,
    samples: int,  # noqa: ARG001
    aligned: bool,  # noqa: ARG001
    channels_last: bool,
) -> Tensor:
    shape = (rois_R5.shape[0], maps[0].shape[1], side, side)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=layout)


def _spread(
    gradient: Tensor,
    rois_R5: Tensor,
    levels_R: Tensor,
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    samples: int,
    aligned: bool,
) -> list[Tensor]:
    """The gradients of the maps from that of the crops."""
    rois, channels, side, _ = gradient.shape
    pack = not gradient.is_contiguous(memory_format=torch.channels_last)
    if pack:
        gradient = gradient.contiguous()
    packed = torch.empty_like(gradient, memory_format=torch.channels_last) if pack else gradient
    rois_R5 = rois_R5.contiguous()
    sizes = [*of_levels(heights), *of_levels(widths), *of_levels([1 / s for s in strides])]
    result = _fake_spread(
        gradient, rois_R5, levels_R, images, heights, widths, strides, samples, aligned
    )
    touched = levels_R.new_empty(5, rois)
    # As maxima that start from zero, one launch fills both columns.
    places = levels_R.new_zeros(images, 2)
    if rois:
        _touch[(rois,)](
            gradient,
            packed,
            rois_R5,
            levels_R,
            touched,
            places,
            *sizes,
            rois,
            channels,
            side,
            samples,
            aligned,
            pack,
            *_steps(channels, side, not pack),
            _TOUCHED_BINS,
            _TOUCHED_CHANNELS,
            enable_fp_fusion=True,
        )
    tiles = [
        images * triton.cdiv(h, _TILE) * triton.cdiv(w, _TILE)
        for h, w in zip(heights, widths, strict=True)
    ]
    # The first tile of each level; a level that is not there begins behind the last one.
    first = [sum(tiles[:level]) for level in range(MOST_LEVELS)]
    # As many bytes of shared memory for every type.
    wide = _TILE_CHANNELS * 2 // gradient.element_size()
    blocks = triton.cdiv(channels, wide)
    # A product has at least 16 bins.
    columns = max(triton.next_power_of_2(side), 4)
    _gather[(sum(tiles) * blocks,)](
        packed,
        rois_R5,
        touched,
        places,
        *of_levels(result),
        *sizes,
        *first,
        sum(tiles),
        rois,
        channels,
        side,
        samples,
        aligned,
        _TILE,
        wide,
        min(max(_PRODUCT // columns, 1), columns),
        columns,
        num_warps=_GATHER_WARPS,
        enable_fp_fusion=True,
    )
    return result


def _fake_spread(
    gradient: Tensor,
    rois_R5: Tensor,  # noqa: ARG001
    levels_R: Tensor,  # noqa: ARG001
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],  # noqa: ARG001
    samples: int,  # noqa: ARG001
    aligned: bool,  # noqa: ARG001
) -> list[Tensor]:
    return [
        torch.empty(
            (images, gradient.shape[1], height, width),
            dtype=gradient.dtype,
            device=gradient.device,
            memory_format=torch.channels_last,
        )
        for height, width in zip(heights, widths, strict=True)
    ]


def _keep(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    maps, rois_R5, levels_R, strides, _, samples, aligned, _ = inputs
    ctx.save_for_backward(rois_R5, levels_R)
    heights, widths = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
    ctx.sizes = (maps[0].shape[0], heights, widths, strides, samples, aligned)


def _backward(ctx: _Context, gradient: Tensor) -> tuple[list[Tensor] | None, ...]:
    to_maps = torch.ops.maskray.spread_levels(gradient, *ctx.saved_tensors, *ctx.sizes)
    return to_maps, None, None, None, None, None, None, None


def of_levels(values: Sequence[T]) -> list[T]:
    """As many values as a kernel has levels; no RoI has a level beyond those of `values`."""
    return [*values, *[values[-1]] * (MOST_LEVELS - len(values))]


def _steps(channels: int, side: int, channels_last: bool) -> tuple[int, int]:
    """From one channel of a crop to the next, and from one bin to the next."""
    return (1, channels) if channels_last else (side * side, 1)


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


@triton.jit
def _of(level, a, b, c, d, e):  # type: ignore[no-untyped-def]
    """The value of a level."""
    coarse = tl.where(level == 2, c, tl.where(level == 3, d, e))
    return tl.where(level == 0, a, tl.where(level == 1, b, coarse))


@triton.jit  # type: ignore[untyped-decorator]
def _span(corner, scale, SAMPLED: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a RoI starts on an axis and the length of a bin, in cells.

    corner: its first coordinate; the last is two further.
    """
    start, end = tl.load(corner) * scale, tl.load(corner + 2) * scale
    if ALIGNED:
        start, end = start - 0.5, end - 0.5
        length = end - start
    else:
        length = tl.maximum(end - start, 1.0)
    return start, length / SAMPLED


@triton.jit
def _taps(point, cells):  # type: ignore[no-untyped-def]
    """Of a sample: its cell, the next one, the share of the next one, whether it is on the map."""
    inside = (point >= -1.0) & (point <= cells)
    point = tl.minimum(tl.maximum(point, 0.0), cells - 1.0)
    low = point.to(tl.int32)
    return low, tl.minimum(low + 1, cells - 1), point - low, inside


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _assign(  # type: ignore[no-untyped-def]
    rois,
    finite,
    levels,
    num_rois,
    canonical_side,
    second,
    LEVELS: tl.constexpr,
    ROIS: tl.constexpr,
):
    """The finite RoIs and the levels of ROIS RoIs."""
    roi = tl.program_id(0) * ROIS + tl.arange(0, ROIS)
    there = roi < num_rois
    tl.store(finite + roi * 5, tl.load(rois + roi * 5, there, 0.0), there)
    x0, y0 = _finite(rois + roi * 5 + 1, there), _finite(rois + roi * 5 + 2, there)
    x1, y1 = _finite(rois + roi * 5 + 3, there), _finite(rois + roi * 5 + 4, there)
    tl.store(finite + roi * 5 + 1, x0, there)
    tl.store(finite + roi * 5 + 2, y0, there)
    tl.store(finite + roi * 5 + 3, x1, there)
    tl.store(finite + roi * 5 + 4, y1, there)
    side = tl.sqrt_rn(tl.maximum(x1 - x0, 0.0) * tl.maximum(y1 - y0, 0.0))
    # Comparisons in the place of a logarithm; 1e-6 as in `assign_levels`.
    side = tl.div_rn(side, canonical_side + tl.zeros_like(side)) + 1e-6
    level = tl.zeros((ROIS,), tl.int32)
    for _ in tl.static_range(LEVELS - 1):
        level += (side >= second).to(tl.int32)
        second *= 2
    tl.store(levels + roi, level, there)


@triton.jit
def _finite(number, there):  # type: ignore[no-untyped-def]
    value = tl.load(number, there, 0.0)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _crop(  # type: ignore[no-untyped-def]
    map_0,
    map_1,
    map_2,
    map_3,
    map_4,
    height_0,
    height_1,
    height_2,
    height_3,
    height_4,
    width_0,
    width_1,
    width_2,
    width_3,
    width_4,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    scale_4,
    rois,
    levels,
    crops,
    CHANNEL_STEP: tl.constexpr,
    BIN_STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program crops BINS bins of WIDE channels of a RoI."""
    bin_blocks = tl.cdiv(SIDE * SIDE, BINS)
    blocks = bin_blocks * tl.cdiv(CHANNELS, WIDE)
    roi, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    level = tl.load(levels + roi)
    height = _of(level, height_0, height_1, height_2, height_3, height_4)
    width = _of(level, width_0, width_1, width_2, width_3, width_4)
    scale = _of(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    corner = rois + roi * 5 + 1
    x0, bin_width = _span(corner, scale, SIDE, ALIGNED)
    y0, bin_height = _span(corner + 1, scale, SIDE, ALIGNED)
    # 64 bits: an image's first number may lie beyond 2 ** 31.
    image = tl.load(rois + roi * 5).to(tl.int64)
    channel = block // bin_blocks * WIDE + tl.arange(0, WIDE)
    cells = _of(level, map_0, map_1, map_2, map_3, map_4) + image * (height * width * CHANNELS)
    cells += channel[None, :]
    place = block % bin_blocks * BINS + tl.arange(0, BINS)
    row, column = place // SIDE, place % SIDE
    there = (place < SIDE * SIDE)[:, None] & (channel < CHANNELS)[None, :]
    total = tl.zeros((BINS, WIDE), tl.float32)
    for i in tl.static_range(SAMPLES):
        y = y0 + row * bin_height + (i + 0.5) * bin_height / SAMPLES
        top, bottom, down, in_rows = _taps(y, height)
        for j in tl.static_range(SAMPLES):
            x = x0 + column * bin_width + (j + 0.5) * bin_width / SAMPLES
            left, right, across, in_columns = _taps(x, width)
            reads = there & (in_rows & in_columns)[:, None]
            a = tl.load(cells + ((top * width + left) * CHANNELS)[:, None], reads, 0.0)
            b = tl.load(cells + ((top * width + right) * CHANNELS)[:, None], reads, 0.0)
            c = tl.load(cells + ((bottom * width + left) * CHANNELS)[:, None], reads, 0.0)
            d = tl.load(cells + ((bottom * width + right) * CHANNELS)[:, None], reads, 0.0)
            total += (
                a.to(tl.float32) * ((1 - down) * (1 - across))[:, None]
                + b.to(tl.float32) * ((1 - down) * across)[:, None]
                + c.to(tl.float32) * (down * (1 - across))[:, None]
                + d.to(tl.float32) * (down * across)[:, None]
            )
    total = total / (SAMPLES * SAMPLES)
    crop = crops + roi.to(tl.int64) * (SIDE * SIDE * CHANNELS)
    target = crop + place[:, None] * BIN_STEP + channel[None, :] * CHANNEL_STEP
    tl.store(target, total.to(crops.dtype.element_ty), there)


@triton.jit  # type: ignore[untyped-decorator]
def _extent(start, bin_length, cells, SIDE: tl.constexpr, SAMPLES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the last cell of a RoI on an axis, and whether there is one."""
    one = start + 0.5 * bin_length / SAMPLES
    other = start + (SIDE - 1) * bin_length + (SAMPLES - 0.5) * bin_length / SAMPLES
    low, high = tl.minimum(one, other), tl.maximum(one, other)
    first, _, _, _ = _taps(low, cells)
    _, last, _, _ = _taps(high, cells)
    return first, last, (high >= -1.0) & (low <= cells)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _touch(  # type: ignore[no-untyped-def]
    gradient,
    packed,
    rois,
    levels,
    touched,
    places,
    height_0,
    height_1,
    height_2,
    height_3,
    height_4,
    width_0,
    width_1,
    width_2,
    width_3,
    width_4,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    scale_4,
    num_rois,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACK: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
    BIN_STEP: tl.constexpr,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The cells of a RoI, and the first and the last RoI of its image that has any.

    packed: with PACK, the gradient channels last.
    touched: (5, R), image and level as one number (-1 for no cell), then first and last row and
    column. A RoI whose gradient is zero has no cell: padding and RoIs that do not count.
    places: (B, 2), the greatest R - r and r + 1.
    """
    roi = tl.program_id(0)
    level = tl.load(levels + roi)
    scale = _of(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    corner = rois + roi * 5 + 1
    x0, bin_width = _span(corner, scale, SIDE, ALIGNED)
    y0, bin_height = _span(corner + 1, scale, SIDE, ALIGNED)
    height = _of(level, height_0, height_1, height_2, height_3, height_4)
    width = _of(level, width_0, width_1, width_2, width_3, width_4)
    top, bottom, in_rows = _extent(y0, bin_height, height, SIDE, SAMPLES)
    left, right, in_columns = _extent(x0, bin_width, width, SIDE, SAMPLES)
    place, channel = tl.arange(0, BINS)[:, None], tl.arange(0, WIDE)[None, :]
    own = gradient + roi.to(tl.int64) * (SIDE * SIDE * CHANNELS)
    own += place * BIN_STEP + channel * CHANNEL_STEP
    target = packed + roi.to(tl.int64) * (SIDE * SIDE * CHANNELS) + place * CHANNELS + channel
    nonzero = tl.zeros((BINS, WIDE), tl.int32)
    for bin in range(0, SIDE * SIDE, BINS):
        for first in range(0, CHANNELS, WIDE):
            there = (place < SIDE * SIDE - bin) & (channel < CHANNELS - first)
            numbers = tl.load(own + bin * BIN_STEP + first * CHANNEL_STEP, there, 0.0)
            nonzero |= (numbers.to(tl.float32) != 0.0).to(tl.int32)
            if PACK:
                tl.store(target + bin * CHANNELS + first, numbers, there)
    image = tl.load(rois + roi * 5).to(tl.int32)
    touches = in_rows & in_columns & (tl.max(tl.max(nonzero, axis=1), axis=0) > 0)
    tl.store(touched + roi, tl.where(touches, image * 8 + level, -1))
    tl.store(touched + num_rois + roi, top)
    tl.store(touched + 2 * num_rois + roi, bottom)
    tl.store(touched + 3 * num_rois + roi, left)
    tl.store(touched + 4 * num_rois + roi, right)
    tl.atomic_max(places + 2 * image, num_rois - roi, touches, sem="relaxed")
    tl.atomic_max(places + 2 * image + 1, roi + 1, touches, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _shares(  # type: ignore[no-untyped-def]
    cell, bin, start, bin_length, cells, SIDE: tl.constexpr, SAMPLES: tl.constexpr
):
    """(cells, bins): how much of a cell is in a bin, on an axis."""
    total = tl.zeros((cell.shape[0], bin.shape[0]), tl.float32)
    for i in tl.static_range(SAMPLES):
        point = start + bin * bin_length + (i + 0.5) * bin_length / SAMPLES
        inside = (point >= -1.0) & (point <= cells) & (bin < SIDE)
        point = tl.minimum(tl.maximum(point, 0.0), cells - 1.0)
        near = tl.maximum(1.0 - tl.abs(cell[:, None] - point[None, :]), 0.0)
        total += tl.where(inside[None, :], near, 0.0)
    return total / SAMPLES


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    gradient,
    rois,
    touched,
    places,
    to_map_0,
    to_map_1,
    to_map_2,
    to_map_3,
    to_map_4,
    height_0,
    height_1,
    height_2,
    height_3,
    height_4,
    width_0,
    width_1,
    width_2,
    width_3,
    width_4,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    scale_4,
    tile_0,
    tile_1,
    tile_2,
    tile_3,
    tile_4,
    num_tiles,
    num_rois,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program sums WIDE channels of TILE x TILE cells over the RoIs that touch them.

    ROWS x COLUMNS: the bins of one product.
    """
    blocks = tl.cdiv(CHANNELS, WIDE)
    # Tiles of coarse maps are touched by the most RoIs: they come first, to end together.
    tile, block = num_tiles - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks
    level = (tile >= tile_1).to(tl.int32) + (tile >= tile_2).to(tl.int32)
    level += (tile >= tile_3).to(tl.int32) + (tile >= tile_4).to(tl.int32)
    height = _of(level, height_0, height_1, height_2, height_3, height_4)
    width = _of(level, width_0, width_1, width_2, width_3, width_4)
    scale = _of(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    tile -= _of(level, tile_0, tile_1, tile_2, tile_3, tile_4)
    across, down = tl.cdiv(width, TILE), tl.cdiv(height, TILE)
    image = tile // (across * down)
    top, left = tile // across % down * TILE, tile % across * TILE
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    channel = block * WIDE + tl.arange(0, WIDE)
    bin = tl.arange(0, ROWS * COLUMNS)
    bin_column, some_rois = bin % COLUMNS, tl.arange(0, 32)
    total = tl.zeros((TILE * TILE, WIDE), tl.float32)
    first = num_rois - tl.load(places + 2 * image)
    for start in range(first, tl.load(places + 2 * image + 1), 32):
        roi = start + some_rois
        there = roi < num_rois
        touches = tl.load(touched + roi, there, -1) == image * 8 + level
        touches &= tl.load(touched + num_rois + roi, there, 0) < top + TILE
        touches &= tl.load(touched + 2 * num_rois + roi, there, 0) >= top
        touches &= tl.load(touched + 3 * num_rois + roi, there, 0) < left + TILE
        touches &= tl.load(touched + 4 * num_rois + roi, there, 0) >= left
        bits = tl.sum(touches.to(tl.int64) << some_rois, axis=0)
        while bits != 0:
            # The exponent of a power of two as a float is the number of its bit.
            power = (bits & -bits).to(tl.float32)
            own = start + ((power.to(tl.int32, bitcast=True) >> 23) - 127)
            bits &= bits - 1
            corner = rois + own * 5 + 1
            x0, bin_width = _span(corner, scale, SIDE, ALIGNED)
            y0, bin_height = _span(corner + 1, scale, SIDE, ALIGNED)
            in_columns = _shares(column, tl.arange(0, COLUMNS), x0, bin_width, width, SIDE, SAMPLES)
            crop = gradient + own.to(tl.int64) * (SIDE * SIDE * CHANNELS)
            for first_row in tl.static_range(0, SIDE, ROWS):
                in_rows = _shares(
                    row, first_row + tl.arange(0, ROWS), y0, bin_height, height, SIDE, SAMPLES
                )
                touched_rows = ROWS >= SIDE
                if ROWS < SIDE:
                    touched_rows = tl.max(tl.max(in_rows, axis=1), axis=0) > 0
                if touched_rows:
                    bin_row = first_row + bin // COLUMNS
                    numbers = tl.load(
                        crop
                        + ((bin_row * SIDE + bin_column) * CHANNELS)[:, None]
                        + channel[None, :],
                        ((bin_row < SIDE) & (bin_column < SIDE))[:, None]
                        & (channel < CHANNELS)[None, :],
                        0.0,
                    )
                    shares = in_rows[:, None, :, None] * in_columns[None, :, None, :]
                    shares = tl.reshape(shares, (TILE * TILE, ROWS * COLUMNS))
                    total = _product(shares, numbers, total)
    cells = _of(level, to_map_0, to_map_1, to_map_2, to_map_3, to_map_4)
    cells += image.to(tl.int64) * (height * width * CHANNELS)
    place = tl.arange(0, TILE * TILE)
    y, x = top + place // TILE, left + place % TILE
    tl.store(
        cells + ((y * width + x) * CHANNELS)[:, None] + channel[None, :],
        total.to(cells.dtype.element_ty),
        ((y < height) & (x < width))[:, None] & (channel < CHANNELS)[None, :],
    )


@triton.jit
def _product(shares, numbers, total):  # type: ignore[no-untyped-def]
    """total + shares x numbers, to float32's precision."""
    if numbers.dtype == tl.float32:
        return tl.dot(shares, numbers, total, input_precision="tf32x3")
    # A share as the sum of two numbers of 8 (bfloat16) or 11 (float16) bits.
    high = shares.to(numbers.dtype)
    low = (shares - high.to(tl.float32)).to(numbers.dtype)
    return tl.dot(low, numbers, tl.dot(high, numbers, total))


torch.library.define(
    "maskray::assign_levels", "(Tensor rois_R5, int[] strides) -> (Tensor, Tensor)"
)
_LEVELS = "Tensor rois_R5, Tensor levels_R"
torch.library.define(
    "maskray::align_levels",
    f"(Tensor[] maps, {_LEVELS}, int[] strides, int side, int samples, bool aligned, "
    "bool channels_last) -> Tensor",
)
torch.library.define(
    "maskray::spread_levels",
    f"(Tensor gradient, {_LEVELS}, int images, int[] heights, int[] widths, int[] strides, "
    "int samples, bool aligned) -> Tensor[]",
)
for _device in ("cuda", "cpu"):  # on the CPU for Triton's interpreter alone
    torch.library.impl("maskray::assign_levels", _device, _assigned)
    torch.library.impl("maskray::align_levels", _device, _forward)
    torch.library.impl("maskray::spread_levels", _device, _spread)
torch.library.register_fake("maskray::assign_levels", _fake_assigned)
torch.library.register_fake("maskray::align_levels", _fake)
torch.library.register_fake("maskray::spread_levels", _fake_spread)
torch.library.register_autograd("maskray::align_levels", _backward, setup_context=_keep)
