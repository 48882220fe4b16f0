"""What the box head and the mask head read of a RoI: their own crops, or C4's res5 shared by both.

Axes: R RoIs, P of them positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.roi.operations import RoIOperation


class SeparateCrops(nn.Module):
    """Two crops of one RoI: 7 x 7 for the box head and 14 x 14 for masks and keypoints (FPN, C5)."""

    def __init__(self, box: RoIOperation, mask: RoIOperation) -> None:
        super().__init__()
        self.box = box
        self.mask = mask

    def for_boxes(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        crops: Tensor = self.box(maps, rois_R5)
        return crops

    def for_masks(self, maps: Sequence[Tensor], rois_P5: Tensor) -> Tensor:
        crops: Tensor = self.mask(maps, rois_P5)
        return crops

    def for_positives(
        self, maps: Sequence[Tensor], rois_P5: Tensor, box_features: Tensor, rows_P: Tensor
    ) -> Tensor:
        """The mask features of training RoIs, of which `box_features[rows_P]` are the box features."""
        return self.for_masks(maps, rois_P5)


class SharedCrops(nn.Module):
    """One crop through res5 to 7 x 7 features that feed every head (C4). In training they are computed once."""

    def __init__(self, crop: RoIOperation, res5: nn.Module) -> None:
        super().__init__()
        self.crop = crop
        self.res5 = res5

    def for_boxes(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        features: Tensor = self.res5(self.crop(maps, rois_R5))
        return features

    def for_masks(self, maps: Sequence[Tensor], rois_P5: Tensor) -> Tensor:
        return self.for_boxes(maps, rois_P5)

    def for_positives(
        self, maps: Sequence[Tensor], rois_P5: Tensor, box_features: Tensor, rows_P: Tensor
    ) -> Tensor:
        return box_features[rows_P]
