"""Anchors of one level.

Every cell of a feature map carries the same boxes, shifted by the stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(sizes_px: Sequence[int], ratios: Sequence[float], rounded: bool) -> Tensor:
    """(A, 4) boxes around the origin, sizes slowest.

    A ratio is height over width at constant area.
    """
    # The order of operations is torchvision's, so that rounded anchors are its anchors.
    ratio = torch.tensor(ratios, dtype=torch.float32)
    heights_of_one = torch.sqrt(ratio)
    widths_of_one = 1 / heights_of_one
    size = torch.tensor(sizes_px, dtype=torch.float32)
    widths = (size[:, None] * widths_of_one).flatten()
    heights = (size[:, None] * heights_of_one).flatten()
    boxes = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return boxes.round() if rounded else boxes


def grid_anchors(cell_A4: Tensor, rows: int, columns: int, stride_yx: tuple[int, int]) -> Tensor:
    """(rows * columns * A, 4) boxes in canvas pixels: row, column, anchor.

    The first cell is at the origin.
    """
    y, x = (
        torch.arange(0, cells * step, step, device=cell_A4.device, dtype=torch.float32)
        for cells, step in zip((rows, columns), stride_yx, strict=True)
    )
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    return (shifts[:, :, None] + cell_A4).reshape(-1, 4)
