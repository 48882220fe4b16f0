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
from torch import Tensor

from model.gpu.roi_align_kernels import (
    MOST_LEVELS,
    assign_kernel,
    crop_kernel,
    gather_kernel,
    touch_kernel,
)
from model.roi.operations import (
    CANONICAL_LOG_STRIDE,
    CANONICAL_SIDE_PX,
    Align,
    RoIOperation,
)

# Blocks: the fastest of those that benchmarks/roi_align.py tries, on an H200.
_BINS, _CHANNELS, _CROP_WARPS = 8, 256, 4  # a forward program's
_TOUCHED_BINS, _TOUCHED_CHANNELS = 16, 256  # of a gradient that is read at a time
# A backward program's: cells of a side, channels of 16 bits, bins of one matrix product.
_TILE, _TILE_CHANNELS, _PRODUCT, _GATHER_WARPS = 8, 256, 64, 4
_ROIS = 128  # that one program assigns

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
        assign_kernel[(triton.cdiv(len(rois_R5), _ROIS),)](
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
        crop_kernel[(len(rois_R5) * blocks,)](
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
        touch_kernel[(rois,)](
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
    gather_kernel[(sum(tiles) * blocks,)](
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
