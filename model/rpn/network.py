"""Region proposal network (Faster R-CNN, arXiv 1506.01497): head, sampled anchors, loss.

Axes: B images, N anchors of all levels, A anchors per cell, G padded objects, Q padded proposals, S
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone.networks import ConvReLU
from model.boxes import encode
from model.losses import box_loss
from model.matching import MatchedSampling, Rule, Sample, take_rows
from model.rpn.anchors import cell_anchors, grid_anchors
from model.rpn.proposals import OFFSET_WEIGHTS, AnchorOutputs, ProposalFilter, Proposals
from model.sample_hash import RPN_STREAM


@dataclass(frozen=True)
class RPNTargets:
    """The sampled anchors of a batch and, for the positives among them, their object's box.

    index, valid, positive: (B, S). boxes_xyxy: (B, P, 4), the objects of the first P columns.
    """

    sample: Sample
    boxes_xyxy: Tensor

    @property
    def count(self) -> Tensor:
        """How many anchors the losses sum over."""
        return self.sample.valid.sum().float()


class AnchorSampler(nn.Module):
    """At most `size` anchors an image, at most `positive_fraction` of them positive.

    An anchor is positive if its IoU with an object is `positive_iou` or more, or if it is an
    object's best; else it is negative if its IoU is below `negative_iou` (Faster R-CNN, section
    3.1.2).
    """

    def __init__(
        self, size: int, positive_fraction: float, positive_iou: float, negative_iou: float
    ) -> None:
        super().__init__()
        self.choose = MatchedSampling(
            Rule(size, positive_fraction, positive_iou, negative_iou, True, RPN_STREAM)
        )

    def forward(
        self, anchors_N4: Tensor, objects_BG4: Tensor, valid_BG: Tensor, noise_keys_B: Tensor
    ) -> RPNTargets:
        """The sampled anchors of each image."""
        chosen = self.choose(anchors_N4[None], None, None, objects_BG4, valid_BG, noise_keys_B)
        objects = chosen.object_BS[:, : chosen.sample.most_positives]
        return RPNTargets(chosen.sample, take_rows(objects_BG4, objects))


class RPN(nn.Module):
    """A 3 x 3 convolution and two 1 x 1, shared by all levels; their loss and their proposals."""

    def __init__(
        self,
        channels: int,
        sizes_px: Sequence[Sequence[int]],
        ratios: Sequence[float],
        strides: Sequence[int],
        rounded: bool,
        sampler: AnchorSampler,
        proposals: ProposalFilter,
        beta: float,
    ) -> None:
        """sizes_px, ratios, rounded: as `cell_anchors` takes them. beta: of the box loss."""
        super().__init__()
        per_cell = len(sizes_px[0]) * len(ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_relu = ConvReLU()
        self.neighbourhoods = Neighbourhoods()
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.offsets = nn.Conv2d(channels, 4 * per_cell, 1)
        self.strides = tuple(strides)
        self.rounded = rounded
        self.sampler = sampler
        self.proposals = proposals
        self.beta = beta
        for level, sizes in enumerate(sizes_px):
            # Not in the state dict: they follow from the config.
            self.register_buffer(
                f"cell_{level}", cell_anchors(sizes, ratios, rounded), persistent=False
            )

    # Without gradients: the loss reads the few sampled anchors, and `at` computes those again.
    @torch.no_grad()
    def forward(self, maps: Sequence[Tensor], canvas: tuple[int, int]) -> AnchorOutputs:
        """Every anchor of the maps (B, C, H_l, W_l). canvas: height and width in pixels."""
        logits, offsets, anchors = [], [], []
        for level, features in enumerate(maps):
            hidden = self.conv_relu(self.conv, features)
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            offsets.append(
                self.offsets(hidden).permute(0, 2, 3, 1).reshape(features.shape[0], -1, 4)
            )
            anchors.append(self._anchors(level, features, canvas))
        return AnchorOutputs(logits, offsets, anchors)

    def at(self, maps: Sequence[Tensor], index_BS: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, with gradients and of the anchors `index_BS`: (B, S) and (B, S, 4)."""
        # A sampled anchor sees 3 x 3 cells, so this is a product over those. The convolution over
        # all cells would have a backward pass as dense as the maps, for a gradient that is zero at
        # all but S cells.
        per_cell = self.objectness.out_channels
        # Anchors of a cell are neighbours in the list, so a division finds the cell.
        cell, kind = torch.div(index_BS, per_cell, rounding_mode="floor"), index_BS % per_cell
        hidden = F.relu(
            F.linear(self.neighbourhoods(maps, cell), self.conv.weight.flatten(1), self.conv.bias)
        )
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias)
        offsets = F.linear(hidden, self.offsets.weight.flatten(1), self.offsets.bias)
        offsets = torch.unflatten(offsets, 2, (per_cell, 4))
        own = offsets.gather(2, kind[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0]
        return logits.gather(2, kind[:, :, None])[:, :, 0], own

    def targets(
        self, outputs: AnchorOutputs, objects_BG4: Tensor, valid_BG: Tensor, noise_keys_B: Tensor
    ) -> RPNTargets:
        """The anchors that train the RPN on these objects."""
        targets: RPNTargets = self.sampler(
            torch.cat(outputs.anchors), objects_BG4, valid_BG, noise_keys_B
        )
        return targets

    def losses(
        self, maps: Sequence[Tensor], outputs: AnchorOutputs, targets: RPNTargets
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss, each summed over the sampled anchors of the batch."""
        logits, offsets = self.at(maps, targets.sample.index)
        return rpn_losses(logits, offsets, torch.cat(outputs.anchors), targets, self.beta)

    def propose(self, outputs: AnchorOutputs, sizes_B2: Tensor, training: bool) -> Proposals:
        """The best boxes of images of these heights and widths."""
        return cast(Proposals, self.proposals(outputs, sizes_B2, training))

    def _anchors(self, level: int, features: Tensor, canvas: tuple[int, int]) -> Tensor:
        rows, columns = features.shape[-2:]
        stride = (self.strides[level], self.strides[level])
        if (
            self.rounded
        ):  # torchvision's convention: what the canvas and the map say, not the network
            stride = (canvas[0] // rows, canvas[1] // columns)
        return grid_anchors(getattr(self, f"cell_{level}"), rows, columns, stride)


class Neighbourhoods(nn.Module):
    """`neighbourhoods` as a part: `model.gpu` has a faster one."""

    def forward(self, maps: Sequence[Tensor], cell_BS: Tensor) -> Tensor:
        """(B, S, 9 C)."""
        return neighbourhoods(maps, cell_BS)


def neighbourhoods(maps: Sequence[Tensor], cell_BS: Tensor) -> Tensor:
    """The 3 x 3 cells around each cell, (B, S, 9 C), zero outside its map.

    Their order is that of a convolution's weights.

    cell_BS counts the cells of all maps (B, C, H_l, W_l), one after the other, row by row.
    """
    # Fixed shapes: every map is read for every cell (its own or some other), and what is not its
    # own is dropped.
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
    sampled = targets.sample
    logits = logits_BS.float()
    weight = sampled.valid.to(logits.dtype)
    # The box loss reads positives alone, and they stand first: a slice of fixed length.
    loss = F.binary_cross_entropy_with_logits(
        logits, sampled.positive.to(logits.dtype), reduction="none"
    )
    positives = slice(0, sampled.most_positives)
    offsets = offsets_BS4[:, positives]
    wanted = encode(anchors_N4[sampled.index[:, positives]], targets.boxes_xyxy, OFFSET_WEIGHTS)
    weight_of_box = sampled.positive[:, positives].to(logits.dtype)
    boxes = box_loss(offsets.flatten(0, 1), wanted.flatten(0, 1), weight_of_box.flatten(), beta)
    return (loss * weight).sum(), boxes
