"""What stands around a convolution on a GPU, each in one pass over channels-last memory.

Before it: weights in the type and the layout that cuDNN reads. After it: bias, sum and ReLU. In the
backward pass: the sum of gradients, the ReLU's mask and the bias's gradient. The kernels read and
write the type of their tensors and compute in float32.

Axes: N images, C channels, H and W sides, O and I channels out and in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backbone.networks import FoldedConv2d

_TILE = 4096  # numbers a program: 32 for each of its 128 threads
_SUMMED_TILES = 8  # for each partial sum of the bias's gradient


def enter_weight(
    weight_OIHW: Tensor, norm: FoldedConv2d | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The weight as the convolution reads it, with the norm's scale, and the norm's shift (O,).

    Autocast would cast it, and cuDNN would copy it to channels-last.
    """
    entered = torch.empty_like(weight_OIHW, dtype=dtype, memory_format=torch.channels_last)
    shift = None if norm is None else torch.empty_like(norm.norm_bias)
    _convert(weight_OIHW, entered, norm, shift)
    return entered, shift


def leave_weight(gradient_OIHW: Tensor, weight_OIHW: Tensor, norm: FoldedConv2d | None) -> Tensor:
    """The gradient of `weight`, in its type and layout, from that of the entered weight."""
    # The strides of the parameter: autograd and DDP take the gradient without a copy.
    left = torch.empty_like(weight_OIHW)
    _convert(gradient_OIHW, left, norm, None)
    return left


def _convert(
    source: Tensor, result: Tensor, norm: FoldedConv2d | None, shift: Tensor | None
) -> None:
    _, inside, rows, columns = source.shape
    if not source.numel():
        return
    for weight in (source, result):  # a row's last cell and the next row's first are neighbours
        assert rows == 1 or columns == 1 or weight.stride(2) == columns * weight.stride(3)
    buffers = [None] * 4 if norm is None else [*norm.buffers(recurse=False)]
    strides = [s for w in (source, result) for s in (w.stride(0), w.stride(1), _cell_stride(w))]
    _weight[(triton.cdiv(source.numel(), _TILE),)](
        *(source, result, *buffers, shift, *strides, source.numel(), inside, rows * columns),
        *(0.0 if norm is None else norm.eps, norm is not None, shift is not None, _TILE),
    )


def _cell_stride(weight: Tensor) -> int:
    return weight.stride(3) if weight.shape[3] > 1 else weight.stride(2)


def finish(
    out_NCHW: Tensor,
    biases_C: Sequence[Tensor],
    other_NCHW: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(out + biases + other) in the memory of `out`. At most two biases.

    other: of any height and width; the nearest cell is read (`F.interpolate`).
    """
    assert is_channels_last(out_NCHW)
    images, channels, height, width = out_NCHW.shape
    if not out_NCHW.numel():
        return out_NCHW
    low, narrow = (height, width) if other_NCHW is None else other_NCHW.shape[2:]
    resized = (low, narrow) != (height, width)
    other = None if other_NCHW is None else channels_last(other_NCHW)
    first, second, *_ = [*biases_C, None, None]
    rows, block_rows, block = images * height * width, *_blocks(channels)
    _finish[(triton.cdiv(rows, block_rows) * triton.cdiv(channels, block),)](
        *(out_NCHW, other, first, second, rows, channels),
        *(height, width, low, narrow, low / height, narrow / width),
        *(first is not None, second is not None, other is not None, resized, relu),
        *(block_rows, block),
    )
    return out_NCHW


def pool_relu(maps_NCHW: Tensor, bias_C: Tensor) -> Tensor:
    """relu(max_pool2d(maps + bias, 3, 2, 1)), without gradients."""
    maps = channels_last(maps_NCHW)
    images, channels, height, width = maps.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    result = maps.new_empty(images, rows, columns, channels).permute(0, 3, 1, 2)
    if not result.numel():
        return result
    block_rows, block = _blocks(channels)
    blocks = triton.cdiv(images * rows * columns, block_rows) * triton.cdiv(channels, block)
    _pool_relu[(blocks,)](
        *(maps, bias_C, result, images * rows * columns, channels),
        *(height, width, rows, columns, block_rows, block),
    )
    return result


def masked_sum(
    gradients_NCHW: Sequence[Tensor], y_NCHW: Tensor | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what `finish` summed, and that of its bias (float32).

    gradients: one to three of y. y: what `finish` returned, None without a ReLU. The bias's sum has
    a fixed order.
    """
    gradients = [channels_last(gradient) for gradient in gradients_NCHW]
    first = gradients[0]
    if len(gradients) == 1 and y_NCHW is None:
        bias = first.sum((0, 2, 3), dtype=torch.float32) if with_bias else None
        return first, bias
    images, channels, height, width = first.shape
    rows, block_rows, block = images * height * width, *_blocks(channels)
    tiles = _SUMMED_TILES if with_bias else 1
    parts = triton.cdiv(rows, block_rows * tiles)
    result = torch.empty_like(first)
    partial = first.new_empty(parts, channels, dtype=torch.float32) if with_bias else None
    if first.numel():
        _masked_sum[(parts * triton.cdiv(channels, block),)](
            *(*[*gradients, None, None][:3], y_NCHW, result, partial, rows, channels),
            *(len(gradients), y_NCHW is not None, with_bias, tiles, block_rows, block),
        )
    return result, None if partial is None else partial.sum(dim=0)


def halved_sum(gradient_NCHW: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of each 2 x 2 cells (the gradient of nearest upsampling by 2), and of all (float32).

    torch's kernel reads and writes channels-first copies.
    """
    gradient = channels_last(gradient_NCHW)
    images, channels, height, width = gradient.shape
    assert height % 2 == 0
    assert width % 2 == 0
    rows, block_rows, block = images * height * width // 4, *_blocks(channels)
    parts = triton.cdiv(rows, block_rows * _SUMMED_TILES)
    result = gradient.new_empty(images, height // 2, width // 2, channels).permute(0, 3, 1, 2)
    partial = gradient.new_empty(parts, channels, dtype=torch.float32) if with_bias else None
    if gradient.numel():
        _halved_sum[(parts * triton.cdiv(channels, block),)](
            *(gradient, result, partial, rows, channels, width // 2),
            *(with_bias, _SUMMED_TILES, block_rows, block),
        )
    return result, None if partial is None else partial.sum(dim=0)


def finish_own(out_RCMM: Tensor, bias_C: Tensor | None, weight_RC: Tensor) -> Tensor:
    """relu(out + bias) in the memory of `out`; returns its products with each RoI's own weights.

    (R, M, M).
    """
    assert is_channels_last(out_RCMM)
    rois, channels, height, width = out_RCMM.shape
    result = out_RCMM.new_empty(rois, height, width)
    block_cells, block = _blocks(channels)
    if out_RCMM.numel():
        _finish_own[(rois, triton.cdiv(height * width, block_cells))](
            *(out_RCMM, bias_C, weight_RC.contiguous(), result, height * width, channels),
            *(bias_C is not None, block_cells, block),
        )
    return result


def own_gradients(
    gradient_RMM: Tensor, y_RCMM: Tensor, weight_RC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `out`, `weight` and `bias` of `finish_own`. y: what `out` became."""
    rois, channels, height, width = y_RCMM.shape
    to_out = torch.empty_like(y_RCMM)
    to_weight = torch.empty_like(weight_RC, memory_format=torch.contiguous_format)
    partial = y_RCMM.new_empty(rois, channels, dtype=torch.float32)
    block_cells, block = _blocks(channels)
    if y_RCMM.numel():
        _own_gradients[(rois, triton.cdiv(channels, block))](
            *(gradient_RMM.contiguous(), y_RCMM, weight_RC.contiguous(), to_out, to_weight),
            *(partial, height * width, channels, block_cells, block),
        )
    return to_out, to_weight, partial.sum(dim=0)


def channels_last(maps_NCHW: Tensor) -> Tensor:
    """The maps in dense channels-last memory."""
    return maps_NCHW.contiguous(memory_format=torch.channels_last)


def is_channels_last(maps_NCHW: Tensor) -> bool:
    """Whether their memory is dense and channels-last."""
    return maps_NCHW.is_contiguous(memory_format=torch.channels_last)


def _blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a program's tile."""
    block = min(triton.next_power_of_2(channels), 256)
    return _TILE // block, block


@triton.jit  # type: ignore[untyped-decorator]
def _weight(  # type: ignore[no-untyped-def]
    source,
    result,
    norm_weight,
    norm_bias,
    mean,
    variance,
    shift,
    source_out,
    source_in,
    source_cell,
    result_out,
    result_in,
    result_cell,
    numbers,
    inside,
    cells,
    eps,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program TILE numbers, in channels-last order."""
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = number < numbers
    channel, cell, out = number % inside, number // inside % cells, number // (inside * cells)
    place = source + out * source_out + channel * source_in + cell * source_cell
    value = tl.load(place, there, 0.0).to(tl.float32)
    if NORM:
        scale = tl.load(norm_weight + out, there, 0.0)
        scale /= tl.sqrt(tl.load(variance + out, there, 0.0) + eps)
        value *= scale
        if SHIFT:
            first = there & (channel == 0) & (cell == 0)
            moved = tl.load(mean + out, first, 0.0) * scale
            tl.store(shift + out, tl.load(norm_bias + out, first, 0.0) - moved, first)
    place = result + out * result_out + channel * result_in + cell * result_cell
    tl.store(place, value.to(result.dtype.element_ty), there)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    out,
    other,
    first,
    second,
    rows,
    channels,
    height,
    width,
    low,
    narrow,
    of_height,
    of_width,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    OTHER: tl.constexpr,
    RESIZED: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a tile of pixels and channels."""
    across = tl.cdiv(channels, BLOCK)
    # 64 bits: a large batch's maps have more than 2 ** 31 numbers.
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < channels
    there = (row < rows)[:, None] & in_channels[None, :]
    place = row[:, None] * channels + channel[None, :]
    value = tl.load(out + place, there, 0.0).to(tl.float32)
    if FIRST:
        value += tl.load(first + channel, in_channels, 0.0).to(tl.float32)[None, :]
    if SECOND:
        value += tl.load(second + channel, in_channels, 0.0).to(tl.float32)[None, :]
    if OTHER:
        if RESIZED:
            image, y, x = row // (height * width), row // width % height, row % width
            # As torch rounds it.
            y = tl.minimum((y.to(tl.float32) * of_height).to(tl.int64), low - 1)
            x = tl.minimum((x.to(tl.float32) * of_width).to(tl.int64), narrow - 1)
            nearest = (image * low + y) * narrow + x
            value += tl.load(other + nearest[:, None] * channels + channel[None, :], there, 0.0).to(
                tl.float32
            )
        else:
            value += tl.load(other + place, there, 0.0).to(tl.float32)
    if RELU:
        value = tl.where(value <= 0.0, 0.0, value)  # NaN stays, as in torch
    tl.store(out + place, value.to(out.dtype.element_ty), there)


@triton.jit  # type: ignore[untyped-decorator]
def _pool_relu(  # type: ignore[no-untyped-def]
    maps,
    bias,
    result,
    num_rows,
    channels,
    height,
    width,
    rows,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a tile of output pixels and channels."""
    across = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < channels
    there = (row < num_rows)[:, None] & in_channels[None, :]
    image, top, left = row // (rows * columns), row // columns % rows, row % columns
    best = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for cell in tl.static_range(9):
        y, x = 2 * top + (cell // 3 - 1), 2 * left + (cell % 3 - 1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = ((image * height + y) * width + x)[:, None] * channels + channel[None, :]
        value = tl.load(maps + place, there & inside[:, None], float("-inf")).to(tl.float32)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    best += tl.load(bias + channel, in_channels, 0.0).to(tl.float32)[None, :]
    best = tl.where(best <= 0.0, 0.0, best)
    place = row[:, None] * channels + channel[None, :]
    tl.store(result + place, best.to(result.dtype.element_ty), there)


@triton.jit  # type: ignore[untyped-decorator]
def _masked_sum(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    y,
    result,
    partial,
    rows,
    channels,
    GRADIENTS: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program TILES tiles of pixels, one after the other, and their channels."""
    across = tl.cdiv(channels, BLOCK)
    part = tl.program_id(0) // across
    channel = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        row = (part.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & in_channels[None, :]
        place = row[:, None] * channels + channel[None, :]
        value = tl.load(first + place, there, 0.0).to(tl.float32)
        if GRADIENTS > 1:
            value += tl.load(second + place, there, 0.0).to(tl.float32)
        if GRADIENTS > 2:
            value += tl.load(third + place, there, 0.0).to(tl.float32)
        if RELU:
            value = tl.where(tl.load(y + place, there, 0.0).to(tl.float32) <= 0.0, 0.0, value)
        tl.store(result + place, value.to(result.dtype.element_ty), there)
        if BIAS:
            total += tl.sum(value, axis=0)
    if BIAS:
        tl.store(partial + part * channels + channel, total, in_channels)


@triton.jit  # type: ignore[untyped-decorator]
def _halved_sum(  # type: ignore[no-untyped-def]
    gradient,
    result,
    partial,
    rows,
    channels,
    width,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program TILES tiles of cells of the result, which is `width` wide."""
    across = tl.cdiv(channels, BLOCK)
    part = tl.program_id(0) // across
    channel = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        row = (part.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & in_channels[None, :]
        top = row // width * 2  # of the image's row, images one below the other
        value = tl.zeros((ROWS, BLOCK), tl.float32)
        for cell in tl.static_range(4):
            place = (top + cell // 2) * (2 * width) + row % width * 2 + cell % 2
            value += tl.load(
                gradient + place[:, None] * channels + channel[None, :], there, 0.0
            ).to(tl.float32)
        place = row[:, None] * channels + channel[None, :]
        tl.store(result + place, value.to(result.dtype.element_ty), there)
        if BIAS:
            total += tl.sum(value, axis=0)
    if BIAS:
        tl.store(partial + part * channels + channel, total, in_channels)


@triton.jit  # type: ignore[untyped-decorator]
def _finish_own(  # type: ignore[no-untyped-def]
    out,
    bias,
    weight,
    result,
    cells,
    channels,
    BIAS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a RoI and a tile of its cells."""
    roi = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    total = tl.zeros((CELLS,), tl.float32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        in_channels = channel < channels
        there = (cell < cells)[:, None] & in_channels[None, :]
        place = out + (roi * cells + cell)[:, None] * channels + channel[None, :]
        value = tl.load(place, there, 0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + channel, in_channels, 0.0).to(tl.float32)[None, :]
        stored = tl.where(value <= 0.0, 0.0, value).to(out.dtype.element_ty)
        tl.store(place, stored, there)
        own = tl.load(weight + roi * channels + channel, in_channels, 0.0).to(tl.float32)
        total += tl.sum(stored.to(tl.float32) * own[None, :], axis=1)
    tl.store(result + roi * cells + cell, total.to(result.dtype.element_ty), cell < cells)


@triton.jit  # type: ignore[untyped-decorator]
def _own_gradients(  # type: ignore[no-untyped-def]
    gradient,
    y,
    weight,
    to_out,
    to_weight,
    partial,
    cells,
    channels,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a RoI and a block of channels: their sums over the RoI's cells are whole."""
    roi = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_channels = channel < channels
    own = tl.load(weight + roi * channels + channel, in_channels, 0.0).to(tl.float32)
    of_weight, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        there = (cell < cells)[:, None] & in_channels[None, :]
        of_cell = tl.load(gradient + roi * cells + cell, cell < cells, 0.0).to(tl.float32)[:, None]
        place = (roi * cells + cell)[:, None] * channels + channel[None, :]
        hidden = tl.load(y + place, there, 0.0).to(tl.float32)
        of_weight += tl.sum(of_cell * hidden, axis=0)
        value = tl.where(hidden <= 0.0, 0.0, of_cell * own[None, :])
        tl.store(to_out + place, value.to(to_out.dtype.element_ty), there)
        of_bias += tl.sum(value, axis=0)
    place = roi * channels + channel
    tl.store(to_weight + place, of_weight.to(to_weight.dtype.element_ty), in_channels)
    tl.store(partial + place, of_bias, in_channels)
