"""Which proposals train the heads (Fast R-CNN); the objects join the proposals.

Axes: B images, Q padded proposals, G padded objects, S slots an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.matching import MatchedSampling, Rule, take_rows
from model.roi.samples import Samples
from model.rpn.proposals import Proposals
from model.sample_hash import OBJECT_INDEX, ROI_STREAM


class RoISampler(nn.Module):
    """At most `size` RoIs an image, at most `positive_fraction` of them positive.

    A candidate is positive if its IoU with an object is `positive_iou` or more, else negative.
    """

    def __init__(
        self, num_classes: int, size: int, positive_fraction: float, positive_iou: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.choose = MatchedSampling(
            Rule(size, positive_fraction, positive_iou, positive_iou, False, ROI_STREAM)
        )

    @torch.no_grad()
    def forward(
        self,
        proposals: Proposals,
        objects_BG4: Tensor,
        labels_BG: Tensor,
        valid_BG: Tensor,
        noise_keys_B: Tensor,
    ) -> Samples:
        """The sampled RoIs; no gradient reaches their coordinates."""
        slots = torch.arange(objects_BG4.shape[1], device=objects_BG4.device)
        # The identity of a candidate, not its place: padding and other ranks must not change what
        # it draws.
        identity = torch.cat([proposals.index, (OBJECT_INDEX + slots).expand_as(labels_BG)], dim=1)
        boxes = torch.cat([proposals.boxes_xyxy, objects_BG4], dim=1)
        valid = torch.cat([proposals.valid, valid_BG], dim=1)
        sampled, objects, luck = self.choose(
            boxes, valid, identity, objects_BG4, valid_BG, noise_keys_B
        )
        labels = torch.where(sampled.positive, labels_BG.gather(1, objects), self.num_classes)
        return Samples(
            rois_xyxy=take_rows(boxes, sampled.index) * sampled.valid[:, :, None],
            labels=labels,
            objects=objects,
            valid=sampled.valid,
            positive=sampled.positive,
            keys=luck,
            most_positives=sampled.most_positives,
        )
