"""RoIAlign's mean on the CPU: bilinear sampling is linear and separable, so that a bin is a weighted sum of its cells.

The same numbers as torchvision's kernel, whose backward pass scatters each sample of each channel on its own.

Axes: R RoIs, N images, C channels, S side of the crops, T = 2 samples taps of a bin on one axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.cpu.native import LANES, cells, empty_maps, run, takes

_MAX_SAMPLES = 8  # native.c has room for 16 x 16 cells of a bin


def fits(features: Tensor, rois_R5: Tensor, samples: int) -> bool:
    """Whether `align_by_bins` takes these maps (N, C, H, W), RoIs and so many samples of a bin's side."""
    return (
        0 < samples <= _MAX_SAMPLES and features.shape[1] % LANES == 0 and takes(features, rois_R5)
    )


def align_by_bins(
    features: Tensor, rois_R5: Tensor, scale: float, side: int, samples: int, aligned: bool
) -> Tensor:
    """As `torchvision.ops.roi_align`, (R, C, S, S), channels last."""
    assert fits(features, rois_R5, samples)
    corners = rois_R5[:, 1:] * scale - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1)
    rows, row_weights = _taps(corners[:, 1], sides[:, 1], features.shape[2], side, samples)
    columns, column_weights = _taps(corners[:, 0], sides[:, 0], features.shape[3], side, samples)
    crops: Tensor = _Bins.apply(
        features, rois_R5[:, 0].to(torch.int32), rows, row_weights, columns, column_weights
    )
    return crops


def _taps(
    start_R: Tensor, length_R: Tensor, cells: int, side: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Cells (R, side, 2 samples), int32, and weights of each bin on one axis; points over one cell outside are 0.

    Of a RoI that is not finite the weights are not, but its cells are inside.
    """
    step = (torch.arange(side * samples, dtype=start_R.dtype, device=start_R.device) + 0.5) / (
        side * samples
    )
    points = start_R[:, None] + step * length_R[:, None]
    inside = ((points >= -1) & (points <= cells)).to(points.dtype) / samples
    points = points.clamp(0, cells - 1)
    low = points.floor()
    share = points - low
    index = torch.stack([low, low + 1], dim=2).to(torch.int32).clamp(0, cells - 1)
    weights = torch.stack([(1 - share) * inside, share * inside], dim=2)
    return index.view(-1, side, 2 * samples), weights.view(-1, side, 2 * samples)


class _Bins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, *bins: Tensor) -> Tensor:
        """bins: image (R,), rows (R, S, T), their weights, columns (R, S, T), their weights."""
        ctx.save_for_backward(*bins)
        ctx.shape = x_NCHW.shape
        rois, side, taps = bins[1].shape
        crops = empty_maps(rois, x_NCHW.shape[1], side, side)
        run(
            "bins_forward", cells(x_NCHW), *bins, cells(crops), rois, side, taps, *_sizes(ctx.shape)
        )
        return crops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RCSS: Tensor) -> tuple[Tensor | None, ...]:
        bins = ctx.saved_tensors
        to_x = empty_maps(*ctx.shape).zero_()
        run(
            "bins_backward",
            cells(gradient_RCSS),
            *bins,
            cells(to_x),
            *bins[1].shape,
            *_sizes(ctx.shape),
        )
        return to_x, *[None] * len(bins)


def _sizes(shape_NCHW: torch.Size) -> tuple[int, int, int]:
    _, channels, height, width = shape_NCHW
    return height, width, channels
