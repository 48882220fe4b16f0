"""From what the RPN says of every anchor, or from a file, to the proposals that the heads read.

Axes: B images, N anchors of all levels, Q padded proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import OffsetWeights, at_least, clip, decode
from model.matching import take_rows
from model.rpn.nms import Suppression

OFFSET_WEIGHTS: OffsetWeights = (1.0, 1.0)  # the RPN's offsets are not scaled


@dataclass(frozen=True)
class AnchorOutputs:
    """Logits and offsets of every anchor, per level: (B, N_l) and (B, N_l, 4), with the anchors.

    anchors: (N_l, 4), canvas pixels.
    """

    logits: list[Tensor]
    offsets: list[Tensor]
    anchors: list[Tensor]


@dataclass(frozen=True)
class Proposals:
    """The proposals of a batch, best first, padded to Q an image.

    boxes_xyxy: (B, Q, 4), canvas pixels. scores: (B, Q) in (0, 1). valid: bool (B, Q).

    index: int64 (B, Q), the anchor that a proposal grew from (or its place in a fixed list): its
    identity for noise.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    valid: Tensor
    index: Tensor


@dataclass(frozen=True)
class Counts:
    """How many boxes pass: per level and image before suppression, per image after it."""

    before_nms: int
    after_nms: int


class ProposalFilter(nn.Module):
    """The best anchors per level and image, decoded, clipped, suppressed; then the best of all."""

    def __init__(self, train: Counts, test: Counts, max_iou: float, min_side_px: float) -> None:
        super().__init__()
        self.train_counts = train
        self.test_counts = test
        self.min_side_px = min_side_px
        self.suppress = Suppression(max_iou)

    @torch.no_grad()
    def forward(self, outputs: AnchorOutputs, sizes_B2: Tensor, training: bool) -> Proposals:
        """The proposals of images of these heights and widths; `training` decides how many."""
        counts = self.train_counts if training else self.test_counts
        boxes_BLK4, scores_BLK, index_BLK = self._best_of_levels(outputs, sizes_B2, counts)
        finite = scores_BLK.abs() < torch.inf
        keep = self.suppress(boxes_BLK4.flatten(0, 1), finite.flatten(0, 1))
        kept = keep.view(len(sizes_B2), -1)
        final = torch.where(kept, torch.sigmoid(scores_BLK.flatten(1)), -torch.inf)
        # Saturated scores tie: the finer level and then the larger logit come first, as in
        # torchvision. A score that is not negative is in the order of its bits, so its place
        # below them makes the top-k that of a stable sort, at a third of the launches.
        place = torch.arange(final.shape[1], device=final.device)
        rank = (final.view(torch.int32).to(torch.int64) << 32) - place
        where = torch.topk(rank, min(counts.after_nms, final.shape[1]), dim=1).indices
        top = final.gather(1, where)
        valid = top > -torch.inf
        return Proposals(
            take_rows(boxes_BLK4.flatten(1, 2), where) * valid[:, :, None],
            torch.where(valid, top, 0),
            valid,
            index_BLK.flatten(1).gather(1, where),
        )

    def _best_of_levels(
        self, outputs: AnchorOutputs, sizes_B2: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best K of each level: boxes (B, L, K, 4), logits and anchor indices (B, L, K).

        The logits of padding are -inf; it has the box and the index of some anchor.
        """
        best, index, offsets, first = [], [], [], 0
        most = max(min(counts.before_nms, logits.shape[1]) for logits in outputs.logits)
        for logits, own_offsets in zip(outputs.logits, outputs.offsets, strict=True):
            top, where = torch.topk(logits, min(counts.before_nms, logits.shape[1]), dim=1)
            own = take_rows(own_offsets, where)
            # Coarse levels have fewer anchors; equal lengths let all levels be decoded and
            # suppressed at once.
            if short := most - top.shape[1]:
                top = F.pad(top, (0, short), value=-torch.inf)
                where, own = F.pad(where, (0, short)), F.pad(own, (0, 0, 0, short))
            best.append(top)
            index.append(where + first)
            offsets.append(own)
            first += logits.shape[1]
        index_BLK = torch.stack(index, dim=1)
        references = torch.cat(outputs.anchors)[index_BLK]
        decoded = clip(decode(references, torch.stack(offsets, dim=1), OFFSET_WEIGHTS), sizes_B2)
        # In fp32: under autocast the logits are bf16.
        scores = torch.stack(best, dim=1).float()
        large = at_least(decoded, self.min_side_px)
        return decoded, torch.where(large, scores, -torch.inf), index_BLK


@dataclass(frozen=True)
class FixedProposals:
    """Proposals that come with the batch, from a file.

    The best `most_train` or `most_test` of an image.
    """

    most_train: int
    most_test: int

    def __call__(self, boxes_BQ4: Tensor, training: bool) -> Proposals:
        """The proposals of a batch, (B, Q, 4) in canvas pixels.

        Raises ValueError if it carries none.
        """
        if boxes_BQ4.shape[1] == 0:
            raise ValueError(
                "proposals.kind is 'fixed', but the batch carries no proposals; "
                "give the loader their URI"
            )
        boxes = boxes_BQ4[:, : self.most_train if training else self.most_test]
        # Boxes without an area are the loader's padding.
        valid = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        index = torch.arange(boxes.shape[1], device=boxes.device).expand(boxes.shape[:2])
        return Proposals(boxes, valid.to(boxes.dtype), valid, index)
