"""RoIAlign's mean on the CPU as a weighted sum of cells.

Bilinear sampling is linear and separable, so that a bin is a sum over the cells of its rows and
columns. The numbers are those of torchvision's kernel, whose backward pass scatters each sample of
each channel on its own.

Axes: R RoIs, N images, C channels, S side of the crops, T = 2 samples taps of a bin on one axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cpu.native import (
    LANES,
    Context,
    Gradients,
    cells,
    empty_maps,
    register,
    run,
    takes,
)
from model.roi.operations import sample_mean

_MAX_SAMPLES = 8  # native.c has room for 16 x 16 cells of a bin


class BinMean(nn.Module):
    """`SampleMean` in training by our kernel.

    Inference keeps torchvision's, and so its rounding.
    """

    def forward(
        self,
        features: Tensor,
        rois_R5: Tensor,
        scale: float,
        side: int,
        samples: int,
        aligned: bool,
    ) -> Tensor:
        """As `SampleMean`."""
        # Maps without a gradient are those of inference: a `training` flag does not tell of frozen
        # layers.
        if features.requires_grad and fits(features, rois_R5, samples):
            return align_by_bins(features, rois_R5, scale, side, samples, aligned)
        return sample_mean(features, rois_R5, scale, side, samples, aligned)


def fits(features: Tensor, rois_R5: Tensor, samples: int) -> bool:
    """Whether `align_by_bins` takes these maps (N, C, H, W), RoIs and samples per side of a bin."""
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
    image = rois_R5[:, 0].to(torch.int32)
    return bins(features, image, rows, row_weights, columns, column_weights)


def _taps(
    start_R: Tensor, length_R: Tensor, cells: int, side: int, samples: int
) -> tuple[Tensor, Tensor]:
    """Cells (R, side, 2 samples), int32, and weights of each bin on one axis.

    Points more than one cell outside weigh 0. A RoI that is not finite has weights that are not,
    and cells inside.
    """
    step = (torch.arange(side * samples, dtype=start_R.dtype, device=start_R.device) + 0.5) / (
        side * samples
    )
    points = start_R[:, None] + step * length_R[:, None]
    inside = ((points >= -1) & (points <= cells)).to(points.dtype) / samples
    points = points.clamp(0, cells - 1)
    low = points.floor()
    share = points - low
    # The clamp after the conversion: NaN becomes some integer, and the kernel reads memory by it.
    index = torch.stack([low, low + 1], dim=2).to(torch.int32).clamp(0, cells - 1)
    weights = torch.stack([(1 - share) * inside, share * inside], dim=2)
    return index.view(-1, side, 2 * samples), weights.view(-1, side, 2 * samples)


def _forward(
    x: Tensor,
    image: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    columns: Tensor,
    column_weights: Tensor,
) -> Tensor:
    rois, side, taps = rows.shape
    crops = empty_maps(rois, x.shape[1], side, side)
    tensors = (cells(x), image, rows, row_weights, columns, column_weights, cells(crops))
    run("bins_forward", *tensors, rois, side, taps, x.shape[2], x.shape[3], x.shape[1])
    return crops


def _fake(x: Tensor, _image: Tensor, rows: Tensor, *_: Tensor) -> Tensor:
    crops = x.new_empty(rows.shape[0], x.shape[1], rows.shape[1], rows.shape[1])
    return crops.contiguous(memory_format=torch.channels_last)


def _keep(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])
    ctx.sizes = tuple(inputs[0].shape)


def _backward(ctx: Context, gradient: Tensor) -> Gradients:
    _, rows, *_ = bins = ctx.saved_tensors
    images, channels, height, width = ctx.sizes
    to_x = empty_maps(images, channels, height, width).zero_()
    run("bins_backward", cells(gradient), *bins, cells(to_x), *rows.shape, height, width, channels)
    return to_x, None, None, None, None, None


# Crops (R, C, S, S) of maps (N, C, H, W). image: (R,) int32. rows, columns: (R, S, T) int32.
# Weights: (R, S, T).
bins = register(
    "bins(Tensor x, Tensor image, Tensor rows, Tensor row_weights, Tensor columns, "
    "Tensor column_weights) -> Tensor",
    _forward,
    _fake,
    _keep,
    _backward,
)
