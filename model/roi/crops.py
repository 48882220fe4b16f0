"""What the box head and the mask head read of a RoI: their own crops, or C4's res5 shared by both.

Axes: R RoIs, P of them positive.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.roi.operations import RoIOperation


class SeparateCrops(nn.Module):
    """Two crops of one RoI (FPN, C5).

    The box head reads 7 x 7 cells, masks and keypoints 14 x 14; an MLP of masks may read 7 x 7.
    """

    def __init__(self, box: RoIOperation, mask: RoIOperation) -> None:
        super().__init__()
        self.box = box
        self.mask = mask

    def for_boxes(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """(R, C, 7, 7)."""
        crops: Tensor = self.box(maps, rois_R5)
        return crops

    def for_masks(self, maps: Sequence[Tensor], rois_P5: Tensor) -> Tensor:
        """(P, C, 14, 14)."""
        crops: Tensor = self.mask(maps, rois_P5)
        return crops

    def for_positives(
        self,
        maps: Sequence[Tensor],
        rois_P5: Tensor,
        box_features: Tensor,  # noqa: ARG002 - they have another side
        rows_P: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """The mask features of training RoIs, whose box features are `box_features[rows_P]`."""
        return self.for_masks(maps, rois_P5)


class SharedCrops(nn.Module):
    """One crop through res5 to 7 x 7 features that feed every head (C4).

    In training they are computed once.
    """

    def __init__(self, crop: RoIOperation, res5: nn.Module) -> None:
        super().__init__()
        self.crop = crop
        self.res5 = res5

    def for_boxes(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """(R, C, 7, 7)."""
        features: Tensor = self.res5(self.crop(maps, rois_R5))
        return features

    def for_masks(self, maps: Sequence[Tensor], rois_P5: Tensor) -> Tensor:
        """(P, C, 7, 7): as for boxes, which inference chooses before it comes here."""
        return self.for_boxes(maps, rois_P5)

    def for_positives(
        self,
        maps: Sequence[Tensor],  # noqa: ARG002
        rois_P5: Tensor,  # noqa: ARG002
        box_features: Tensor,
        rows_P: Tensor,
    ) -> Tensor:
        """The box features again: res5 is the costly part, and has seen these RoIs."""
        return box_features[rows_P]
