"""Region proposal network (Faster R-CNN, arXiv 1506.01497): head, loss, and the filter from anchors to proposals.

Axes: B images, N anchors of all levels, A anchors per cell, G padded objects, Q padded proposals, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import OffsetWeights, at_least, clip, decode, encode
from model.losses import box_loss
from model.matching import Sample, match, sample
from model.rpn.anchors import cell_anchors, grid_anchors
from model.rpn.nms import nms
from model.sample_hash import RPN_STREAM, noise

OFFSET_WEIGHTS: OffsetWeights = (1.0, 1.0)


@dataclass(frozen=True)
class AnchorOutputs:
    """What the RPN says of every anchor: logits and offsets per level, (B, N_l) and (B, N_l, 4), with its anchors."""

    logits: list[Tensor]
    offsets: list[Tensor]
    anchors: list[Tensor]  # (N_l, 4), canvas pixels


@dataclass(frozen=True)
class Proposals:
    """boxes_xyxy: (B, Q, 4), canvas pixels, best first. scores: (B, Q) in (0, 1). valid: bool (B, Q).

    index: int64 (B, Q), the anchor that a proposal grew from (or its place in a fixed list): its identity for noise.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    valid: Tensor
    index: Tensor


@dataclass(frozen=True)
class RPNTargets:
    """The sampled anchors of a batch and, for the positives among them, their object's box.

    index, valid, positive: (B, S). boxes_xyxy: (B, P, 4), the objects of the first P columns.
    """

    sample: Sample
    boxes_xyxy: Tensor

    @property
    def count(self) -> Tensor:
        return self.sample.valid.sum().float()


class RPN(nn.Module):
    """A 3 x 3 convolution and two 1 x 1 on every level, shared."""

    def __init__(
        self,
        channels: int,
        sizes_px: Sequence[Sequence[int]],
        ratios: Sequence[float],
        strides: Sequence[int],
        rounded: bool,
    ) -> None:
        super().__init__()
        per_cell = len(sizes_px[0]) * len(ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.offsets = nn.Conv2d(channels, 4 * per_cell, 1)
        self.strides = tuple(strides)
        self.rounded = rounded
        for level, sizes in enumerate(sizes_px):
            self.register_buffer(
                f"cell_{level}", cell_anchors(sizes, ratios, rounded), persistent=False
            )

    @torch.no_grad()
    def forward(self, maps: Sequence[Tensor], canvas: tuple[int, int]) -> AnchorOutputs:
        """Every anchor, for proposals. The loss reads the few sampled ones, `at` computes them with gradients."""
        logits, offsets, anchors = [], [], []
        for level, features in enumerate(maps):
            hidden = F.relu(self.conv(features), inplace=True)
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            offsets.append(
                self.offsets(hidden).permute(0, 2, 3, 1).reshape(features.shape[0], -1, 4)
            )
            anchors.append(self._anchors(level, features, canvas))
        return AnchorOutputs(logits, offsets, anchors)

    def at(self, maps: Sequence[Tensor], index_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, S) and offsets (B, S, 4) of the anchors `index_BS`, as `forward` has them, with gradients.

        A sampled anchor sees 3 x 3 cells: a product over those in place of the convolution over all cells, whose
        backward pass would be as dense as the maps for a gradient that is zero at all but S cells.
        """
        per_cell = self.objectness.out_channels
        cell, kind = torch.div(index_BS, per_cell, rounding_mode="floor"), index_BS % per_cell
        hidden = F.relu(
            F.linear(neighbourhoods(maps, cell), self.conv.weight.flatten(1), self.conv.bias)
        )
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias)
        offsets = F.linear(hidden, self.offsets.weight.flatten(1), self.offsets.bias)
        offsets = torch.unflatten(offsets, 2, (per_cell, 4))
        chosen = offsets.gather(2, kind[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0]
        return logits.gather(2, kind[:, :, None])[:, :, 0], chosen

    def _anchors(self, level: int, features: Tensor, canvas: tuple[int, int]) -> Tensor:
        rows, columns = features.shape[-2:]
        stride = (self.strides[level], self.strides[level])
        if self.rounded:
            stride = (canvas[0] // rows, canvas[1] // columns)
        return grid_anchors(getattr(self, f"cell_{level}"), rows, columns, stride)


def sample_anchors(
    anchors_N4: Tensor,
    objects_BG4: Tensor,
    valid_BG: Tensor,
    noise_keys_B: Tensor,
    positive_iou: float,
    negative_iou: float,
    size: int,
    positive_fraction: float,
) -> RPNTargets:
    """Anchors are positive above `positive_iou` or where they are an object's best, negative below `negative_iou`."""
    found = match(anchors_N4[None], objects_BG4, valid_BG)
    positive = (found.iou_BN >= positive_iou) | found.is_best_BN
    negative = (found.iou_BN < negative_iou) & ~positive
    luck = noise(
        noise_keys_B[:, None],
        RPN_STREAM,
        torch.arange(anchors_N4.shape[0], device=anchors_N4.device),
    )
    chosen = sample(positive, negative, luck, size, positive_fraction)
    objects = found.object_BN.gather(1, chosen.index[:, : chosen.most_positives])
    return RPNTargets(chosen, take_rows(objects_BG4, objects))


def neighbourhoods(maps: Sequence[Tensor], cell_BS: Tensor) -> Tensor:
    """(B, S, 9 C) of the 3 x 3 cells around each cell, zero outside its map, in the order of a convolution's weights.

    cell_BS counts the cells of all maps (B, C, H_l, W_l), one after the other, row by row. Fixed shapes: every map is
    read for every cell (its own or some other), and what is not its own is dropped.
    """
    step = torch.arange(-1, 2, device=cell_BS.device)
    result, first = None, 0
    for features in maps:
        rows, columns = features.shape[2:]
        place = cell_BS - first
        mine = (place >= 0) & (place < rows * columns)
        place = place % (rows * columns)
        row = torch.div(place, columns, rounding_mode="floor")[:, :, None, None] + step[:, None]
        column = (place % columns)[:, :, None, None] + step
        inside = (
            (row >= 0) & (row < rows) & (column >= 0) & (column < columns) & mine[:, :, None, None]
        )
        where = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
        values = _take_columns(features.flatten(2), where.flatten(1)) * inside.flatten(1)[:, None]
        result = values if result is None else result + values
        first += rows * columns
    assert result is not None
    return torch.unflatten(result, 2, (-1, 9)).transpose(1, 2).flatten(2)


def _take_columns(values_BCN: Tensor, index_BK: Tensor) -> Tensor:
    return values_BCN.gather(2, index_BK[:, None].expand(-1, values_BCN.shape[1], -1))


def rpn_losses(
    logits_BS: Tensor, offsets_BS4: Tensor, anchors_N4: Tensor, targets: RPNTargets, beta: float
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss, each summed over the sampled anchors of the batch."""
    chosen = targets.sample
    logits = logits_BS.float()
    weight = chosen.valid.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(
        logits, chosen.positive.to(logits.dtype), reduction="none"
    )
    positives = slice(0, chosen.most_positives)
    offsets = offsets_BS4[:, positives]
    wanted = encode(anchors_N4[chosen.index[:, positives]], targets.boxes_xyxy, OFFSET_WEIGHTS)
    weight_of_box = chosen.positive[:, positives].to(logits.dtype)
    boxes = box_loss(offsets.flatten(0, 1), wanted.flatten(0, 1), weight_of_box.flatten(), beta)
    return (loss * weight).sum(), boxes


@torch.no_grad()
def select_proposals(
    outputs: AnchorOutputs,
    sizes_B2: Tensor,
    before_nms: int,
    after_nms: int,
    max_iou: float,
    min_side_px: float,
) -> Proposals:
    """The best anchors per level and image, decoded, clipped, suppressed within their level, then the best of all."""
    boxes, scores, index, first = [], [], [], 0
    images = sizes_B2.shape[0]
    most = max(min(before_nms, anchors.shape[0]) for anchors in outputs.anchors)
    for logits, offsets, anchors in zip(
        outputs.logits, outputs.offsets, outputs.anchors, strict=True
    ):
        best, where = torch.topk(logits.float(), min(before_nms, anchors.shape[0]), dim=1)
        decoded = clip(decode(anchors[where], take_rows(offsets, where), OFFSET_WEIGHTS), sizes_B2)
        best = torch.where(at_least(decoded, min_side_px), best, -torch.inf)
        short = most - best.shape[1]
        boxes.append(F.pad(decoded, (0, 0, 0, short)))
        scores.append(F.pad(best, (0, short), value=-torch.inf))
        index.append(F.pad(where + first, (0, short)))
        first += anchors.shape[0]
    boxes_L, scores_L = (
        torch.stack(boxes, dim=1),
        torch.stack(scores, dim=1),
    )  # (B, levels, most, ...)
    kept = nms(boxes_L.flatten(0, 1), scores_L.isfinite().flatten(0, 1), max_iou).view(images, -1)
    final = torch.where(kept, torch.sigmoid(scores_L.flatten(1)), -torch.inf)
    # Saturated scores tie: the finer level and then the larger logit come first, as in torchvision.
    top, where = (
        ranked[:, :after_nms] for ranked in torch.sort(final, dim=1, descending=True, stable=True)
    )
    valid = top.isfinite()
    chosen = take_rows(boxes_L.flatten(1, 2), where) * valid[:, :, None]
    return Proposals(
        chosen,
        torch.where(valid, top, 0),
        valid,
        torch.stack(index, dim=1).flatten(1).gather(1, where),
    )


def take_rows(values_BNX: Tensor, index_BS: Tensor) -> Tensor:
    """values[b, index[b, s]]: (B, N, X) and (B, S) to (B, S, X)."""
    return values_BNX.gather(1, index_BS[:, :, None].expand(-1, -1, values_BNX.shape[2]))
