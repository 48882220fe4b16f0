"""The box branch: class logits and box offsets of each RoI, their losses, the final detections.

Axes: B images, R RoIs, K classes, D padded detections, Q padded proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from model.boxes import OffsetWeights, at_least, clip, decode, encode
from model.losses import box_loss, class_loss
from model.matching import take_rows
from model.roi.samples import FlatRoIs
from model.rpn.nms import Suppression
from model.sample_hash import DROPOUT_STREAM, noise

OFFSET_WEIGHTS: OffsetWeights = (10.0, 5.0)
_MIN_SIDE_PX = 1e-2  # of a detection, as in torchvision
_LISTS_AT_ONCE = 1024  # of 1,000 boxes each: 131 MB of bits say which of them overlap


class FCTrunk(nn.Module):
    """Fully connected layers with ReLU on the flattened RoI features.

    `dropout` follows every layer (VGG's recipe).
    """

    def __init__(self, in_features: int, widths: list[int], dropout: float) -> None:
        super().__init__()
        self.fc = nn.ModuleList(
            nn.Linear(before, after)
            for before, after in zip([in_features, *widths], widths, strict=False)
        )
        self.dropout = dropout

    def forward(self, features: Tensor, keys_R: Tensor) -> Tensor:
        """RoI features to hidden features (R, C). keys_R: a RoI's dropout is drawn from its key."""
        x = features.flatten(1)
        for layer, fc in enumerate(self.fc):
            x = F.relu(fc(x), inplace=True)
            if self.training and self.dropout:
                x = keyed_dropout(x, keys_R, layer, self.dropout)
        return x


def keyed_dropout(x_RC: Tensor, keys_R: Tensor, layer: int, probability: float) -> Tensor:
    """Dropout whose draws belong to the RoI (`keys_R`) and the unit, whatever batch and rank."""
    # Each layer draws from indices of its own; no layer is as wide as 2 ** 20.
    units = torch.arange(x_RC.shape[1], device=x_RC.device) + layer * (1 << 20)
    draw = noise(keys_R[:, None], DROPOUT_STREAM, units)
    return x_RC * (draw >= int(probability * (1 << 62))) / (1 - probability)


class MeanTrunk(nn.Module):
    """Average pooling alone: what follows C4's res5."""

    def forward(self, features: Tensor, keys_R: Tensor) -> Tensor:  # noqa: ARG002 - no dropout here
        """RoI features (R, C, S, S) to their means, (R, C)."""
        return features.mean(dim=(2, 3))


@dataclass(frozen=True)
class Boxes:
    """The detected boxes of a batch, best first.

    boxes_xyxy: (B, D, 4), canvas pixels. scores, labels, valid: (B, D).
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor


class BoxSelection(nn.Module):
    """Which (proposal, class) pairs become detections.

    Those above the threshold are decoded, clipped and suppressed within their class; the best
    `most` of an image stay.
    """

    def __init__(self, score_threshold: float, max_iou: float, most: int) -> None:
        super().__init__()
        self.score_threshold = score_threshold
        self.max_iou = max_iou
        self.most = most
        self.suppress = Suppression(max_iou)

    def forward(
        self,
        boxes: Sequence[Tensor],
        scores: Sequence[Tensor],
        offsets: Sequence[Tensor],
        sizes_B2: Tensor,
    ) -> Boxes:
        """Per image: proposals (Q, 4), foreground scores (Q, K), offsets (Q, K or 1, 4)."""
        images = [
            self._of_image(*image) for image in zip(boxes, scores, offsets, sizes_B2, strict=True)
        ]
        missing = [self.most - len(scores) for _, scores, _ in images]
        place = torch.arange(self.most, device=sizes_B2.device)
        padded = list(zip(images, missing, strict=True))
        return Boxes(
            torch.stack([F.pad(boxes, (0, 0, 0, pad)) for (boxes, _, _), pad in padded]),
            torch.stack([F.pad(scores, (0, pad)) for (_, scores, _), pad in padded]),
            torch.stack([F.pad(labels, (0, pad)) for (_, _, labels), pad in padded]),
            torch.stack([place < self.most - pad for pad in missing]),
        )

    def _of_image(
        self, boxes_Q4: Tensor, scores_QK: Tensor, offsets_QK4: Tensor, size_2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels, best first."""
        # One proposal may become several detections, one of each class (Fast R-CNN).
        row, labels = (scores_QK > self.score_threshold).nonzero(as_tuple=True)
        own = offsets_QK4[row, labels if offsets_QK4.shape[1] > 1 else 0]
        decoded = clip(decode(boxes_Q4[row], own, OFFSET_WEIGHTS)[None], size_2[None])[0]
        large = at_least(decoded, _MIN_SIDE_PX)
        decoded, scores, labels = decoded[large], scores_QK[row, labels][large], labels[large]
        kept = torchvision.ops.batched_nms(decoded, scores, labels, self.max_iou)[: self.most]
        return decoded[kept], scores[kept], labels[kept]

    def padded(
        self,
        boxes_BQ4: Tensor,
        valid_BQ: Tensor,
        scores_BQK: Tensor,
        offsets_BQX4: Tensor,
        sizes_B2: Tensor,
    ) -> Boxes:
        """As `forward` of the valid proposals, in shapes that do not depend on data.

        offsets_BQX4: X is K or 1.
        """
        classes = scores_BQK.shape[2]
        decoded = clip(decode(boxes_BQ4[:, :, None], offsets_BQX4, OFFSET_WEIGHTS), sizes_B2)
        candidate = valid_BQ[:, :, None] & (scores_BQK > self.score_threshold)
        candidate = candidate & at_least(decoded, _MIN_SIDE_PX)
        decoded = decoded.expand(-1, -1, classes, -1)
        # Every class of every image has a list with all proposals. Only few are candidates, but how
        # many is not known before the host waits for it.
        scores_BKQ = torch.where(candidate, scores_BQK, -torch.inf).transpose(1, 2)
        best, order = torch.sort(scores_BKQ, dim=2, descending=True, stable=True)
        lists = decoded.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, 4))
        keep = self._suppressed(lists.flatten(0, 1), best.isfinite().flatten(0, 1))
        # Back in the order of `forward`, by proposal and then class: it decides among equal scores.
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(2, order, keep.view_as(best))
        final = torch.where(kept.transpose(1, 2), scores_BQK, -torch.inf).flatten(1)
        final = F.pad(final, (0, max(self.most - final.shape[1], 0)), value=-torch.inf)
        top, where = (
            ranked[:, : self.most]
            for ranked in torch.sort(final, dim=1, descending=True, stable=True)
        )
        valid = top.isfinite()
        where = where.masked_fill(~valid, 0)
        return Boxes(
            take_rows(decoded.flatten(1, 2), where).masked_fill(~valid[:, :, None], 0),
            top.masked_fill(~valid, 0),
            where % classes,
            valid,
        )

    def _suppressed(self, lists_LQ4: Tensor, valid_LQ: Tensor) -> Tensor:
        # In parts: a thousand classes would need gigabytes at once.
        boxes, valid = (torch.split(values, _LISTS_AT_ONCE) for values in (lists_LQ4, valid_LQ))
        return torch.cat([self.suppress(*part) for part in zip(boxes, valid, strict=True)])


class BoxBranch(nn.Module):
    """Logits over K classes and background, and offsets for each class or for all together."""

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        num_classes: int,
        class_agnostic: bool,
        background_first: bool,
        beta: float,
        selection: BoxSelection,
        loss_weight: float = 1.0,
    ) -> None:
        """width: of the trunk's output. beta: of the box loss. loss_weight: of both losses."""
        super().__init__()
        self.loss_weight = loss_weight
        self.trunk = trunk
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.offsets = nn.Linear(width, 4 if class_agnostic else 4 * num_classes)
        self.num_classes = num_classes
        self.background_first = background_first
        self.beta = beta
        self.selection = selection

    def forward(self, features: Tensor, keys_R: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features to logits (R, K + 1) and offsets (R, K or 1, 4)."""
        hidden = self.trunk(features, keys_R)
        return self.class_logits(hidden), self.offsets(hidden).unflatten(1, (-1, 4))

    def losses(
        self,
        logits: Tensor,
        offsets: Tensor,
        rois: FlatRoIs,
        object_boxes_R4: Tensor,
        positive_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Class loss over all RoIs and box loss over the positives, as sums.

        The box loss reads the offsets of the true class.
        """
        classes = class_loss(logits, self._target(rois.labels, positive_R > 0), rois.weight)
        # Background RoIs take the last class's offsets; they weigh nothing.
        own = (
            rois.labels.clamp(max=self.num_classes - 1)
            if offsets.shape[1] > 1
            else torch.zeros_like(rois.labels)
        )
        own_offsets = offsets.gather(1, own[:, None, None].expand(-1, 1, 4))[:, 0]
        wanted = encode(rois.boxes_xyxy, object_boxes_R4, OFFSET_WEIGHTS)
        return classes, box_loss(own_offsets, wanted, rois.weight * positive_R, self.beta)

    def _target(self, labels_R: Tensor, positive_R: Tensor) -> Tensor:
        """The place of each RoI's class among the logits."""
        # An object's label outside [0, K) gets a place that does not exist: cross-entropy fails on
        # it. A check of the labels here would make a GPU wait.
        target = (labels_R + 1) % (self.num_classes + 1) if self.background_first else labels_R
        wrong = positive_R & ((labels_R < 0) | (labels_R >= self.num_classes))
        return target.masked_fill(wrong, self.num_classes + 1)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the K foreground classes, (R, K), in float32."""
        probabilities = logits.float().softmax(dim=1)
        # The background has no detections.
        return probabilities[:, 1:] if self.background_first else probabilities[:, :-1]
