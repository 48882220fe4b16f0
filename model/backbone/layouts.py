"""From backbone maps to the maps that the RPN and the RoIs read: C4, C5, conv5 and FPN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Maps(NamedTuple):
    """rpn: maps with anchors, finest first. roi: maps that RoIs are cropped from, finest first."""

    rpn: list[Tensor]
    roi: list[Tensor]


class LastMap(nn.Module):
    """The backbone's last map for both: C4 (res4, stride 16) and VGG's conv5_3."""

    def forward(self, maps: Sequence[Tensor]) -> Maps:
        return Maps([maps[-1]], [maps[-1]])


class ReducedLastMap(nn.Module):
    """C5: res5 at stride 32, for the RPN and the RoIs.

    A 1 x 1 convolution takes its 2048 channels to the width of the FPN-style heads.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Maps:
        reduced = self.reduce(maps[-1])
        return Maps([reduced], [reduced])


class Merge(nn.Module):
    """One level of the FPN before its output convolution; `model.gpu` has a faster one."""

    def forward(self, lateral: nn.Module, x: Tensor, above: Tensor | None) -> Tensor:
        """lateral(x), plus the level above it where there is one."""
        level: Tensor = lateral(x)
        if above is None:
            return level
        return level + F.interpolate(above, size=level.shape[-2:], mode="nearest")


class Pyramid(nn.Module):
    """FPN (arXiv 1612.03144): 1 x 1 laterals, nearest upsampling, 3 x 3 outputs.

    Coarser levels halve the last.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, roi_levels: Sequence[int], num_coarser: int
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        self.merge = Merge()
        self.roi_levels = tuple(roi_levels)  # indices into the outputs
        self.num_coarser = num_coarser

    def forward(self, maps: Sequence[Tensor]) -> Maps:
        """The backbone's maps; its last `len(in_channels)` are merged."""
        used = maps[-len(self.lateral) :]
        merged: list[Tensor] = []
        # Top down: each level adds the one above it, which has its own addition already.
        for lateral, m in zip(reversed(self.lateral), reversed(used), strict=True):
            merged.insert(0, self.merge(lateral, m, merged[0] if merged else None))
        levels = [output(m) for output, m in zip(self.output, merged, strict=True)]
        roi = [levels[i] for i in self.roi_levels]
        for _ in range(self.num_coarser):
            # P6 is P5 subsampled (FPN, section 4.1), which a stride of 2 does without a pooling.
            levels.append(levels[-1][:, :, ::2, ::2])
        return Maps(levels, roi)
