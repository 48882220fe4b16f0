"""The 3 x 3 cells around sampled anchors on a GPU, by RoIAlign's kernels.

A RoI of 3 x 3 cells with one sample a bin reads the cells themselves. torch's `gather` adds the
gradients atomically, in the maps' type and in an order that changes, to a map of its own for each
level.

Axes: B images, C channels, S cells an image, R = B S.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model.gpu.roi_align import align_levels, of_levels
from model.gpu.roi_align_kernels import MOST_LEVELS
from model.rpn.network import neighbourhoods

_BLOCK = 128
_SIZES = [f"{name}_{level}" for name in ("height", "width") for level in range(MOST_LEVELS)]


class Neighbourhoods(nn.Module):
    """`model.rpn.network.Neighbourhoods` by our kernels."""

    def forward(self, maps: Sequence[Tensor], cell_BS: Tensor) -> Tensor:
        """(B, S, 9 C), as `neighbourhoods`."""
        if len(maps) > MOST_LEVELS:
            return neighbourhoods(maps, cell_BS)
        return of_rois(maps, cell_BS)


def trial() -> bool:
    """Whether cells and gradients are torch's, of five maps in bfloat16.

    The constants are those of a feature pyramid's RPN, which compiles nothing again.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 6), (3, 3), (2, 2), (1, 2), (1, 1))
    maps = [torch.randn(2, 256, *size, generator=generator).bfloat16() for size in sizes]
    cells = torch.arange(sum(height * width for height, width in sizes)).expand(2, -1)
    on_gpu = [m.cuda().requires_grad_() for m in maps]
    on_cpu = [m.float().requires_grad_() for m in maps]
    found, wanted = of_rois(on_gpu, cells.cuda()), neighbourhoods(on_cpu, cells)
    upstream = torch.randn(wanted.shape, generator=generator).bfloat16()
    ours = torch.autograd.grad(found, on_gpu, upstream.cuda())
    theirs = torch.autograd.grad(wanted, on_cpu, upstream.float())
    return torch.equal(found.float().cpu(), wanted) and all(
        torch.allclose(one.float().cpu(), other, rtol=0.05, atol=0.05)
        for one, other in zip(ours, theirs, strict=True)
    )


def of_rois(maps: Sequence[Tensor], cell_BS: Tensor) -> Tensor:
    """(B, S, 9 C), as `neighbourhoods`."""
    heights, widths = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
    rois, levels, inside = torch.ops.maskray.place_cells(cell_BS, heights, widths)
    # In cells of their own maps: a stride of 1. RoIAlign repeats the border, a convolution has
    # zeros there.
    strides = [1] * len(maps)
    crops = align_levels(maps, rois, levels, strides, 3, 1, aligned=True, channels_last=False)
    return torch.unflatten((crops * inside).flatten(1), 0, cell_BS.shape)


def _placed(
    cell_BS: Tensor, heights: Sequence[int], widths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The RoIs, their levels, and which of their cells are on the map: bool (R, 1, 3, 3)."""
    rois, levels, inside = _fake_placed(cell_BS, heights, widths)
    if len(rois):
        _place[(triton.cdiv(len(rois), _BLOCK),)](
            cell_BS.contiguous(),
            *of_levels(heights),
            *of_levels(widths),
            rois,
            levels,
            inside.view(torch.uint8),
            len(rois),
            cell_BS.shape[1],
            len(heights),
            _BLOCK,
            enable_fp_fusion=False,
        )
    return rois, levels, inside


def _fake_placed(
    cell_BS: Tensor,
    heights: Sequence[int],  # noqa: ARG001
    widths: Sequence[int],  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    rois = cell_BS.shape[0] * cell_BS.shape[1]
    return (
        cell_BS.new_empty(rois, 5, dtype=torch.float32),
        cell_BS.new_empty(rois, dtype=torch.int32),
        cell_BS.new_empty(rois, 1, 3, 3, dtype=torch.bool),
    )


# fmt: off
@triton.jit(do_not_specialize=[*_SIZES, "num_rois", "num_cells"])  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    cells,
    height_0, height_1, height_2, height_3, height_4,
    width_0, width_1, width_2, width_3, width_4,
    rois,
    levels,
    inside,
    num_rois,
    num_cells,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # fmt: on
    """The RoI, the level and the cells on the map of BLOCK cells."""
    roi = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = roi < num_rois
    cell = tl.load(cells + roi, there, 0).to(tl.int32)
    level = tl.zeros((BLOCK,), tl.int32)
    height, width = level + height_0, level + width_0
    # Cells count through all maps: what lies beyond a map belongs to a later one.
    if LEVELS > 1:
        later = (level == 0) & (cell >= height_0 * width_0)
        cell, level = tl.where(later, cell - height_0 * width_0, cell), tl.where(later, 1, level)
        height, width = tl.where(later, height_1, height), tl.where(later, width_1, width)
    if LEVELS > 2:
        later = (level == 1) & (cell >= height_1 * width_1)
        cell, level = tl.where(later, cell - height_1 * width_1, cell), tl.where(later, 2, level)
        height, width = tl.where(later, height_2, height), tl.where(later, width_2, width)
    if LEVELS > 3:
        later = (level == 2) & (cell >= height_2 * width_2)
        cell, level = tl.where(later, cell - height_2 * width_2, cell), tl.where(later, 3, level)
        height, width = tl.where(later, height_3, height), tl.where(later, width_3, width)
    if LEVELS > 4:
        later = (level == 3) & (cell >= height_3 * width_3)
        cell, level = tl.where(later, cell - height_3 * width_3, cell), tl.where(later, 4, level)
        height, width = tl.where(later, height_4, height), tl.where(later, width_4, width)
    row, column = cell // width, cell % width
    tl.store(levels + roi, level, there)
    tl.store(rois + roi * 5, (roi // num_cells).to(tl.float32), there)
    tl.store(rois + roi * 5 + 1, column.to(tl.float32) - 1.0, there)
    tl.store(rois + roi * 5 + 2, row.to(tl.float32) - 1.0, there)
    tl.store(rois + roi * 5 + 3, column.to(tl.float32) + 2.0, there)
    tl.store(rois + roi * 5 + 4, row.to(tl.float32) + 2.0, there)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            y, x = row + i - 1, column + j - 1
            on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            tl.store(inside + roi * 9 + i * 3 + j, on_map.to(inside.dtype.element_ty), there)


torch.library.define(
    "maskray::place_cells",
    "(Tensor cell_BS, int[] heights, int[] widths) -> (Tensor, Tensor, Tensor)",
)
for _device in ("cuda", "cpu"):  # on the CPU for Triton's interpreter alone
    torch.library.impl("maskray::place_cells", _device, _placed)
torch.library.register_fake("maskray::place_cells", _fake_placed)
