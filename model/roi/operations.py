"""RoIAlign, RoIPool and RoIWarp over one or several feature maps.

Axes: R RoIs, C channels. RoIs are (R, 5): image index in the batch, then x0, y0, x1, y1 in canvas pixels. No arm
has a gradient to RoI coordinates, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from model.cpu.bins import align_by_bins, fits

CropOp = Callable[
    [Tensor, Tensor, float], Tensor
]  # map (B, C, H, W), RoIs (R, 5), 1 / stride -> (R, C, side, side)

_CANONICAL_SIDE_PX, _CANONICAL_LOG_STRIDE = 224.0, 4  # a 224 px box goes to P4, of stride 2 ** 4
_WARP_SAMPLES = 2


def align(
    features: Tensor,
    rois_R5: Tensor,
    scale: float,
    side: int,
    samples: int,
    reduce: str,
    aligned: bool,
) -> Tensor:
    """Mean or max of `samples` x `samples` bilinear values per bin (Mask R-CNN, section 3).

    0 samples: as many as a bin has cells, rounded up (mean only). `aligned` puts the value of a pixel at its centre;
    without it (the first implementations) at its corner, and a RoI is at least one cell wide.
    """
    in_training = (
        features.requires_grad
    )  # inference keeps torchvision's kernel, and so its rounding
    if reduce == "mean" and in_training and fits(features, rois_R5, samples):
        return align_by_bins(features, rois_R5, scale, side, samples, aligned)
    if reduce == "mean":
        crops: Tensor = torchvision.ops.roi_align(
            features, rois_R5, (side, side), scale, samples, aligned
        )
        return crops
    points = torchvision.ops.roi_align(
        features, rois_R5, (side * samples, side * samples), scale, 1, aligned
    )
    return F.max_pool2d(points, samples)


def pool(features: Tensor, rois_R5: Tensor, scale: float, side: int) -> Tensor:
    """Max over integer bins; corners are rounded to cells, and the last cell belongs to the RoI (Fast R-CNN)."""
    crops: Tensor = torchvision.ops.roi_pool(features, rois_R5, (side, side), scale)
    return crops


def warp(features: Tensor, rois_R5: Tensor, scale: float, side: int, reduce: str) -> Tensor:
    """RoIPool's quantised RoI, then RoIAlign's samples (MNC, as compared in Table 2c of Mask R-CNN).

    A corner at x canvas pixels becomes the cell round(x * scale), half away from zero. The RoI covers its cells
    whole: from the left edge of the first to the right edge of the last (the `+1` of RoIPool). Each of the
    side x side bins takes 2 x 2 bilinear samples; the value of a cell stands at its centre.
    """
    corners = rois_R5[:, 1:] * scale
    cells = torch.where(corners < 0, (corners - 0.5).ceil(), (corners + 0.5).floor())
    last = torch.maximum(cells[:, 2:], cells[:, :2]) + 1
    quantised = torch.cat([rois_R5[:, :1], cells[:, :2], last], dim=1)
    return align(features, quantised, 1.0, side, _WARP_SAMPLES, reduce, True)


class RoIOperation(nn.Module):
    """Crops each RoI from the map that its size asks for, at a fixed side."""

    def __init__(self, crop: CropOp, side: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.crop = crop
        self.side = side
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """One (B, C, H, W) map per stride, finest first, to (R, C, side, side)."""
        # A run that diverges has RoIs that are not numbers: its loss tells, torchvision's kernels on the CPU crash.
        rois_R5 = torch.nan_to_num(rois_R5.detach(), 0.0, 0.0, 0.0)
        if len(self.strides) == 1:
            return self.crop(maps[0], rois_R5, 1 / self.strides[0])
        levels = assign_levels(rois_R5[:, 1:], self.strides)
        if rois_R5.device.type == "cpu":
            return self._by_level(maps, rois_R5, levels)
        return self._all_levels(maps, rois_R5, levels)

    def _by_level(self, maps: Sequence[Tensor], rois_R5: Tensor, levels: Tensor) -> Tensor:
        where = [(levels == i).nonzero()[:, 0] for i in range(len(maps))]
        crops = [
            self.crop(m, rois_R5[w], 1 / s)
            for m, w, s in zip(maps, where, self.strides, strict=True)
        ]
        return torch.cat(crops).index_select(0, torch.argsort(torch.cat(where)))

    def _all_levels(self, maps: Sequence[Tensor], rois_R5: Tensor, levels: Tensor) -> Tensor:
        """Fixed shapes: a RoI is cropped from every map, as an empty corner from all but its own."""
        result = None
        for i, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            mine = levels == i
            crops = self.crop(features, torch.where(mine[:, None], rois_R5, 0), 1 / stride)
            crops = torch.where(mine[:, None, None, None], crops, 0)
            result = crops if result is None else result + crops
        assert result is not None
        return result


def assign_levels(boxes_R4: Tensor, strides: Sequence[int]) -> Tensor:
    """Index (R,) into `strides`: floor(4 + log2(sqrt(wh) / 224)) as log2 of the stride, clamped (FPN, equation 1)."""
    sides = torch.sqrt(
        (boxes_R4[:, 2] - boxes_R4[:, 0]).clamp(min=0)
        * (boxes_R4[:, 3] - boxes_R4[:, 1]).clamp(min=0)
    )
    log_stride = torch.floor(_CANONICAL_LOG_STRIDE + torch.log2(sides / _CANONICAL_SIDE_PX + 1e-6))
    finest = strides[0].bit_length() - 1
    return (log_stride - finest).clamp(0, len(strides) - 1).to(torch.int64)


def align_operation(
    side: int, strides: Sequence[int], samples: int, reduce: str, aligned: bool
) -> RoIOperation:
    return RoIOperation(
        partial(align, side=side, samples=samples, reduce=reduce, aligned=aligned), side, strides
    )


def pool_operation(side: int, strides: Sequence[int]) -> RoIOperation:
    return RoIOperation(partial(pool, side=side), side, strides)


def warp_operation(side: int, strides: Sequence[int], reduce: str) -> RoIOperation:
    return RoIOperation(partial(warp, side=side, reduce=reduce), side, strides)
