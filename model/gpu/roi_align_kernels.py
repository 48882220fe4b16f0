"""The kernels of `model.gpu.roi_align`.

A kernel takes a value for each of five levels: Triton has no lists of pointers. Where a pyramid has
fewer levels, the last value stands for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_LEVELS = 5
# Sizes of a canvas: a kernel compiled for some of their divisors would be compiled anew in the
# middle of training.
SIZES = [f"{name}_{level}" for name in ("height", "width", "tile") for level in range(MOST_LEVELS)]
SIZES += ["num_tiles", "num_rois"]


@triton.jit
def of_level(level, a, b, c, d, e):  # type: ignore[no-untyped-def]
    """The value of a level."""
    coarse = tl.where(level == 2, c, tl.where(level == 3, d, e))
    return tl.where(level == 0, a, tl.where(level == 1, b, coarse))


@triton.jit  # type: ignore[untyped-decorator]
def span(corner, scale, SAMPLED: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
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
def taps(point, cells):  # type: ignore[no-untyped-def]
    """Of a sample: its cell, the next one, the share of the next one, whether it is on the map."""
    inside = (point >= -1.0) & (point <= cells)
    point = tl.minimum(tl.maximum(point, 0.0), cells - 1.0)
    low = point.to(tl.int32)
    return low, tl.minimum(low + 1, cells - 1), point - low, inside


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def assign_kernel(  # type: ignore[no-untyped-def]
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
    x0, y0 = finite_or_zero(rois + roi * 5 + 1, there), finite_or_zero(rois + roi * 5 + 2, there)
    x1, y1 = finite_or_zero(rois + roi * 5 + 3, there), finite_or_zero(rois + roi * 5 + 4, there)
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
def finite_or_zero(number, there):  # type: ignore[no-untyped-def]
    value = tl.load(number, there, 0.0)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


# fmt: off
@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def crop_kernel(  # type: ignore[no-untyped-def]
    map_0, map_1, map_2, map_3, map_4,
    height_0, height_1, height_2, height_3, height_4,
    width_0, width_1, width_2, width_3, width_4,
    scale_0, scale_1, scale_2, scale_3, scale_4,
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
    # fmt: on
    """A program crops BINS bins of WIDE channels of a RoI."""
    bin_blocks = tl.cdiv(SIDE * SIDE, BINS)
    blocks = bin_blocks * tl.cdiv(CHANNELS, WIDE)
    roi, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    level = tl.load(levels + roi)
    height = of_level(level, height_0, height_1, height_2, height_3, height_4)
    width = of_level(level, width_0, width_1, width_2, width_3, width_4)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    corner = rois + roi * 5 + 1
    x0, bin_width = span(corner, scale, SIDE, ALIGNED)
    y0, bin_height = span(corner + 1, scale, SIDE, ALIGNED)
    # 64 bits: an image's first number may lie beyond 2 ** 31.
    image = tl.load(rois + roi * 5).to(tl.int64)
    channel = block // bin_blocks * WIDE + tl.arange(0, WIDE)
    cells = of_level(level, map_0, map_1, map_2, map_3, map_4) + image * (height * width * CHANNELS)
    cells += channel[None, :]
    place = block % bin_blocks * BINS + tl.arange(0, BINS)
    row, column = place // SIDE, place % SIDE
    there = (place < SIDE * SIDE)[:, None] & (channel < CHANNELS)[None, :]
    total = tl.zeros((BINS, WIDE), tl.float32)
    for i in tl.static_range(SAMPLES):
        y = y0 + row * bin_height + (i + 0.5) * bin_height / SAMPLES
        top, bottom, down, in_rows = taps(y, height)
        for j in tl.static_range(SAMPLES):
            x = x0 + column * bin_width + (j + 0.5) * bin_width / SAMPLES
            left, right, across, in_columns = taps(x, width)
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
def extent(start, bin_length, cells, SIDE: tl.constexpr, SAMPLES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the last cell of a RoI on an axis, and whether there is one."""
    one = start + 0.5 * bin_length / SAMPLES
    other = start + (SIDE - 1) * bin_length + (SAMPLES - 0.5) * bin_length / SAMPLES
    low, high = tl.minimum(one, other), tl.maximum(one, other)
    first, _, _, _ = taps(low, cells)
    _, last, _, _ = taps(high, cells)
    return first, last, (high >= -1.0) & (low <= cells)


# fmt: off
@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def touch_kernel(  # type: ignore[no-untyped-def]
    gradient,
    packed,
    rois,
    levels,
    touched,
    places,
    height_0, height_1, height_2, height_3, height_4,
    width_0, width_1, width_2, width_3, width_4,
    scale_0, scale_1, scale_2, scale_3, scale_4,
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
    # fmt: on
    """The cells of a RoI, and the first and the last RoI of its image that has any.

    packed: with PACK, the gradient channels last.
    touched: (5, R), image and level as one number (-1 for no cell), then first and last row and
    column. A RoI whose gradient is zero has no cell: padding and RoIs that do not count.
    places: (B, 2), the greatest R - r and r + 1.
    """
    roi = tl.program_id(0)
    level = tl.load(levels + roi)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    corner = rois + roi * 5 + 1
    x0, bin_width = span(corner, scale, SIDE, ALIGNED)
    y0, bin_height = span(corner + 1, scale, SIDE, ALIGNED)
    height = of_level(level, height_0, height_1, height_2, height_3, height_4)
    width = of_level(level, width_0, width_1, width_2, width_3, width_4)
    top, bottom, in_rows = extent(y0, bin_height, height, SIDE, SAMPLES)
    left, right, in_columns = extent(x0, bin_width, width, SIDE, SAMPLES)
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
def shares_of(  # type: ignore[no-untyped-def]
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


# fmt: off
@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    gradient,
    rois,
    touched,
    places,
    to_map_0, to_map_1, to_map_2, to_map_3, to_map_4,
    height_0, height_1, height_2, height_3, height_4,
    width_0, width_1, width_2, width_3, width_4,
    scale_0, scale_1, scale_2, scale_3, scale_4,
    tile_0, tile_1, tile_2, tile_3, tile_4,
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
    # fmt: on
    """A program sums WIDE channels of TILE x TILE cells over the RoIs that touch them.

    ROWS x COLUMNS: the bins of one product.
    """
    blocks = tl.cdiv(CHANNELS, WIDE)
    # Tiles of coarse maps are touched by the most RoIs: they come first, to end together.
    tile, block = num_tiles - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks
    level = (tile >= tile_1).to(tl.int32) + (tile >= tile_2).to(tl.int32)
    level += (tile >= tile_3).to(tl.int32) + (tile >= tile_4).to(tl.int32)
    height = of_level(level, height_0, height_1, height_2, height_3, height_4)
    width = of_level(level, width_0, width_1, width_2, width_3, width_4)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    tile -= of_level(level, tile_0, tile_1, tile_2, tile_3, tile_4)
    across, down = tl.cdiv(width, TILE), tl.cdiv(height, TILE)
    image = tile // (across * down)
    top, left = tile // across % down * TILE, tile % across * TILE
    row, column = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    channel = block * WIDE + tl.arange(0, WIDE)
    some_rois = tl.arange(0, 32)
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
            x0, bin_width = span(corner, scale, SIDE, ALIGNED)
            y0, bin_height = span(corner + 1, scale, SIDE, ALIGNED)
            in_columns = shares_of(
                column, tl.arange(0, COLUMNS), x0, bin_width, width, SIDE, SAMPLES
            )
            crop = gradient + own.to(tl.int64) * (SIDE * SIDE * CHANNELS)
            for first_row in tl.static_range(0, SIDE, ROWS):
                in_rows = shares_of(
                    row, first_row + tl.arange(0, ROWS), y0, bin_height, height, SIDE, SAMPLES
                )
                touched_rows = ROWS >= SIDE
                if ROWS < SIDE:
                    touched_rows = tl.max(tl.max(in_rows, axis=1), axis=0) > 0
                if touched_rows:
                    numbers = bins_of(crop, first_row, channel, CHANNELS, SIDE, ROWS, COLUMNS)
                    shares = in_rows[:, None, :, None] * in_columns[None, :, None, :]
                    shares = tl.reshape(shares, (TILE * TILE, ROWS * COLUMNS))
                    total = product(shares, numbers, total)
    cells = of_level(level, to_map_0, to_map_1, to_map_2, to_map_3, to_map_4)
    cells += image.to(tl.int64) * (height * width * CHANNELS)
    place = tl.arange(0, TILE * TILE)
    y, x = top + place // TILE, left + place % TILE
    tl.store(
        cells + ((y * width + x) * CHANNELS)[:, None] + channel[None, :],
        total.to(cells.dtype.element_ty),
        ((y < height) & (x < width))[:, None] & (channel < CHANNELS)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def bins_of(  # type: ignore[no-untyped-def]
    crop,
    first_row,
    channel,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of ROWS x COLUMNS bins from `first_row` on, zero beyond the crop."""
    bin = tl.arange(0, ROWS * COLUMNS)
    row, column = first_row + bin // COLUMNS, bin % COLUMNS
    return tl.load(
        crop + ((row * SIDE + column) * CHANNELS)[:, None] + channel[None, :],
        ((row < SIDE) & (column < SIDE))[:, None] & (channel < CHANNELS)[None, :],
        0.0,
    )


@triton.jit
def product(shares, numbers, total):  # type: ignore[no-untyped-def]
    """total + shares x numbers, to float32's precision."""
    if numbers.dtype == tl.float32:
        return tl.dot(shares, numbers, total, input_precision="tf32x3")
    # A share as the sum of two numbers of 8 (bfloat16) or 11 (float16) bits.
    high = shares.to(numbers.dtype)
    low = (shares - high.to(tl.float32)).to(numbers.dtype)
    return tl.dot(low, numbers, tl.dot(high, numbers, total))
