"""The keypoint branch: one M x M map per keypoint, a classification over its positions (section 5).

Axes: R RoIs, P keypoint types, M map side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone.networks import ConvReLU
from model.losses import keypoint_loss
from model.roi.samples import FlatRoIs

_UPSAMPLING = 4  # of RoI features to the map: a deconvolution of stride 2, then bilinear by 2


class Doubling(nn.Module):
    """Twice the side, bilinear, as a part: `model.gpu` has one whose gradients repeat."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, 2 H, 2 W) of maps (B, C, H, W)."""
        return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


class KeypointBranch(nn.Module):
    """3 x 3 convolutions, a 4 x 4 deconvolution of stride 2, bilinear upsampling by 2."""

    def __init__(
        self,
        in_channels: int,
        side: int,
        convs: int,
        width: int,
        num_keypoints: int,
        half_pixel_px: float,
        loss_weight: float,
    ) -> None:
        """`side` is that of the RoI features."""
        super().__init__()
        inputs = [in_channels, *[width] * convs]
        self.convs = nn.ModuleList(nn.Conv2d(inputs[i], width, 3, padding=1) for i in range(convs))
        self.conv_relu = ConvReLU()
        self.logits = nn.ConvTranspose2d(width, num_keypoints, 4, stride=2, padding=1)
        self.doubling = Doubling()
        self.side = _UPSAMPLING * side
        self.half_pixel_px = half_pixel_px
        self.loss_weight = loss_weight

    def forward(self, features: Tensor) -> Tensor:
        """RoI features to logits (R, P, M, M)."""
        x = features
        for conv in self.convs:
            x = self.conv_relu(conv, x)
        # The paper deconvolves to 28 x 28, then doubles the side (section 5).
        logits: Tensor = self.doubling(self.logits(x))
        return logits

    def loss(self, logits: Tensor, rois: FlatRoIs, keypoints_BGP3: Tensor) -> Tensor:
        """Sum over the keypoints of weighted RoIs that are labelled and inside their RoI."""
        target, inside = keypoint_targets(
            keypoints_BGP3[rois.image, rois.objects], rois.boxes_xyxy, self.side
        )
        return keypoint_loss(logits, target, inside * rois.weight[:, None])

    def count(self, rois: FlatRoIs, keypoints_BGP3: Tensor) -> Tensor:
        """How many keypoints `loss` sums over."""
        # From the same targets as the loss: a count without the heads has to agree with it.
        _, inside = keypoint_targets(
            keypoints_BGP3[rois.image, rois.objects], rois.boxes_xyxy, self.side
        )
        return (inside * rois.weight[:, None]).sum()


def keypoint_targets(keypoints_RP3: Tensor, rois_R4: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell of each keypoint in a side x side grid over its RoI, int64, and whether it counts.

    Both are (R, P).

    A point on the right or lower edge belongs to the last cell; visibility 0 never counts.
    """
    start, end = rois_R4[:, None, :2], rois_R4[:, None, 2:]
    cell = (
        ((keypoints_RP3[..., :2] - start) * (side / (end - start).clamp(min=1e-6)))
        .floor()
        .to(torch.int64)
    )
    # The corner of a box is a keypoint of it (detectron2 and torchvision count it too).
    cell = torch.where(keypoints_RP3[..., :2] == end, side - 1, cell)
    inside = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints_RP3[..., 2] > 0)
    cell = cell.clamp(0, side - 1)
    return cell[..., 1] * side + cell[..., 0], inside


def keypoint_positions(logits_RPMM: Tensor, rois_R4: Tensor) -> Tensor:
    """(R, P, 3) as x, y in the pixels of the RoIs, and the logit there.

    As in the released code: the map is resized (bicubic) to the RoI's size in whole pixels, and the
    largest value is at its pixel's centre.
    """
    sides_R2 = (rois_R4[:, 2:] - rois_R4[:, :2]).clamp(min=1)
    whole_R2 = sides_R2.ceil()
    best_RP = logits_RPMM.new_zeros(logits_RPMM.shape[:2], dtype=torch.float32)
    place_RP = torch.zeros_like(best_RP, dtype=torch.int64)
    # RoI by RoI: each has a size of its own, and bicubic interpolation takes one size at a time.
    # A GPU waits once, for all sizes.
    for roi, (width, height) in enumerate(whole_R2.long().tolist()):
        resized = F.interpolate(
            logits_RPMM[roi].float()[:, None],
            size=(max(height, 1), max(width, 1)),  # nan became no size at all
            mode="bicubic",
            align_corners=False,
        )
        best_RP[roi], place_RP[roi] = resized.flatten(1).max(dim=1)
    width_R1 = whole_R2[:, :1].long()
    cell_RP2 = torch.stack(
        [place_RP % width_R1, place_RP.div(width_R1, rounding_mode="floor")], dim=2
    )
    xy = (cell_RP2 + 0.5) * (sides_R2 / whole_R2)[:, None] + rois_R4[:, None, :2]
    return torch.cat([xy, best_RP[:, :, None]], dim=2)
