"""Which proposals and objects train the heads (Fast R-CNN's sampling; the objects join the proposals).

Axes: B images, Q padded proposals, G padded objects, S slots an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.matching import match, sample
from model.roi.samples import Samples
from model.rpn.network import Proposals, take_rows
from model.sample_hash import OBJECT_INDEX, ROI_STREAM, noise


@torch.no_grad()
def sample_rois(
    proposals: Proposals,
    objects_BG4: Tensor,
    labels_BG: Tensor,
    valid_BG: Tensor,
    noise_keys_B: Tensor,
    num_classes: int,
    size: int,
    positive_fraction: float,
    positive_iou: float,
) -> Samples:
    """A candidate is positive from `positive_iou` on with an object, else negative. No gradient to coordinates."""
    slots = torch.arange(objects_BG4.shape[1], device=objects_BG4.device)
    index = torch.cat([proposals.index, (OBJECT_INDEX + slots).expand_as(labels_BG)], dim=1)
    boxes = torch.cat([proposals.boxes_xyxy, objects_BG4], dim=1)
    valid = torch.cat([proposals.valid, valid_BG], dim=1)
    found = match(boxes, objects_BG4, valid_BG)
    positive = (found.iou_BN >= positive_iou) & valid
    keys = noise(noise_keys_B[:, None], ROI_STREAM, index)
    chosen = sample(positive, valid & ~positive, keys, size, positive_fraction)
    objects = found.object_BN.gather(1, chosen.index)
    labels = torch.where(chosen.positive, labels_BG.gather(1, objects), num_classes)
    return Samples(
        rois_xyxy=take_rows(boxes, chosen.index) * chosen.valid[:, :, None],
        labels=labels,
        objects=objects,
        valid=chosen.valid,
        positive=chosen.positive,
        keys=keys.gather(1, chosen.index),
        most_positives=chosen.most_positives,
    )
