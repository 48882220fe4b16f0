"""RoIAlign, RoIPool and RoIWarp over one or several feature maps.

Axes: R RoIs, C channels. RoIs are (R, 5): image index in the batch, then x0, y0, x1, y1 in canvas
pixels. No arm has a gradient to RoI coordinates, as published.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

CANONICAL_SIDE_PX, CANONICAL_LOG_STRIDE = 224.0, 4  # a 224 px box goes to P4, of stride 2 ** 4
_WARP_SAMPLES = 2
_CELLS_OFF_MAP = 8.0  # no operation reads further than two cells from its RoI


class SampleMean(nn.Module):
    """`sample_mean` as a part: `model.cpu` has a faster one."""

    def forward(
        self,
        features: Tensor,
        rois_R5: Tensor,
        scale: float,
        side: int,
        samples: int,
        aligned: bool,
    ) -> Tensor:
        """As `sample_mean`."""
        return sample_mean(features, rois_R5, scale, side, samples, aligned)


def sample_mean(
    features: Tensor, rois_R5: Tensor, scale: float, side: int, samples: int, aligned: bool
) -> Tensor:
    """(R, C, side, side) of maps (B, C, H, W), torchvision's; `scale` is 1 / stride."""
    crops: Tensor = torchvision.ops.roi_align(
        features, rois_R5, (side, side), scale, samples, aligned
    )
    return crops


class Align(nn.Module):
    """RoIAlign (Mask R-CNN, section 3): mean or max of `samples` x `samples` values per bin.

    0 samples: as many as a bin has cells, rounded up (mean only). `aligned` puts the value of a
    pixel at its centre. Without it (the first implementations) the value is at the corner, and a
    RoI is at least one cell wide.
    """

    def __init__(self, samples: int, reduce: str, aligned: bool) -> None:
        super().__init__()
        self.samples = samples
        self.reduce = reduce
        self.aligned = aligned
        self.mean = SampleMean()

    def forward(self, features: Tensor, rois_R5: Tensor, scale: float, side: int) -> Tensor:
        """(R, C, side, side) of maps (B, C, H, W); `scale` is 1 / stride."""
        if self.reduce == "mean":
            crops: Tensor = self.mean(features, rois_R5, scale, side, self.samples, self.aligned)
            return crops
        # One sample per bin of a finer grid is every sample by itself; torchvision has no maximum
        # of them.
        points = torchvision.ops.roi_align(
            features, rois_R5, (side * self.samples,) * 2, scale, 1, self.aligned
        )
        return F.max_pool2d(points, self.samples)


class Pool(nn.Module):
    """RoIPool (Fast R-CNN): max over integer bins.

    Corners are rounded to cells, and the last cell belongs to the RoI.
    """

    def forward(self, features: Tensor, rois_R5: Tensor, scale: float, side: int) -> Tensor:
        """(R, C, side, side) of maps (B, C, H, W); `scale` is 1 / stride."""
        crops: Tensor = torchvision.ops.roi_pool(features, rois_R5, (side, side), scale)
        return crops


class Warp(nn.Module):
    """RoIWarp (MNC, as in Table 2c of Mask R-CNN): RoIPool's quantised RoI, RoIAlign's samples.

    A corner at x canvas pixels becomes the cell round(x * scale), half away from zero. The RoI
    covers its cells whole: from the left edge of the first to the right edge of the last (the `+1`
    of RoIPool). Each of the side x side bins takes 2 x 2 bilinear samples; the value of a cell is
    at its centre.
    """

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.align = Align(_WARP_SAMPLES, reduce, aligned=True)

    def forward(self, features: Tensor, rois_R5: Tensor, scale: float, side: int) -> Tensor:
        """(R, C, side, side) of maps (B, C, H, W); `scale` is 1 / stride."""
        corners = rois_R5[:, 1:] * scale
        # torch.round goes to the even neighbour at one half, RoIPool away from zero.
        cells = torch.where(corners < 0, (corners - 0.5).ceil(), (corners + 0.5).floor())
        last = torch.maximum(cells[:, 2:], cells[:, :2]) + 1
        quantised = torch.cat([rois_R5[:, :1], cells[:, :2], last], dim=1)
        crops: Tensor = self.align(features, quantised, 1.0, side)
        return crops


class RoIOperation(nn.Module):
    """Crops each RoI at a fixed side, from the map of the level that its size belongs to."""

    def __init__(self, crop: Align | Pool | Warp, side: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.crop = crop
        self.side = side
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """One (B, C, H, W) map per stride, finest first, to (R, C, side, side)."""
        # A run that diverges has RoIs that are not numbers. Its loss shows that; torchvision's
        # kernels would crash.
        rois_R5 = torch.nan_to_num(rois_R5.detach(), 0.0, 0.0, 0.0)
        if len(self.strides) == 1:
            crops: Tensor = self.crop(maps[0], rois_R5, 1 / self.strides[0], self.side)
            return crops
        levels = assign_levels(rois_R5[:, 1:], self.strides)
        # Only a GPU waits for lengths that depend on data.
        if rois_R5.device.type == "cpu":
            return self._by_level(maps, rois_R5, levels)
        return self._all_levels(maps, rois_R5, levels)

    def _by_level(self, maps: Sequence[Tensor], rois_R5: Tensor, levels: Tensor) -> Tensor:
        where = [(levels == i).nonzero()[:, 0] for i in range(len(maps))]
        crops = [
            self.crop(m, rois_R5[w], 1 / s, self.side)
            for m, w, s in zip(maps, where, self.strides, strict=True)
        ]
        # Back to the order of the RoIs.
        return torch.cat(crops).index_select(0, torch.argsort(torch.cat(where)))

    def _all_levels(self, maps: Sequence[Tensor], rois_R5: Tensor, levels: Tensor) -> Tensor:
        """As `_by_level`, in fixed shapes.

        Each RoI is cropped from every map. On all but its own it lies off the map, so that its crop
        is zero.
        """
        # No sample of a RoI off the map has a gradient. torchvision's kernel adds the gradient of
        # every sample on the map atomically, also where that gradient is zero.
        result = None
        for i, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            boxes = torch.where((levels == i)[:, None], rois_R5[:, 1:], -_CELLS_OFF_MAP * stride)
            own = torch.cat([rois_R5[:, :1], boxes], dim=1)
            crops: Tensor = self.crop(features, own, 1 / stride, self.side)
            result = crops if result is None else result + crops
        assert result is not None
        return result


def assign_levels(boxes_R4: Tensor, strides: Sequence[int]) -> Tensor:
    """Index (R,) into `strides` of the map of each box (FPN, equation 1).

    The log2 of its stride is floor(4 + log2(sqrt(wh) / 224)), clamped.
    """
    sides = torch.sqrt(
        (boxes_R4[:, 2] - boxes_R4[:, 0]).clamp(min=0)
        * (boxes_R4[:, 3] - boxes_R4[:, 1]).clamp(min=0)
    )
    # 1e-6 keeps the logarithm of an empty box finite, and 224 px on its own level.
    log_stride = torch.floor(CANONICAL_LOG_STRIDE + torch.log2(sides / CANONICAL_SIDE_PX + 1e-6))
    finest = strides[0].bit_length() - 1
    return (log_stride - finest).clamp(0, len(strides) - 1).to(torch.int64)
