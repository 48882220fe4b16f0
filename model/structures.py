"""What crosses the border of `model`: a padded batch in, loss terms or padded detections out.

Axes: B images, G padded objects, D padded detections, P keypoint types, S side of a mask crop, M
side of a predicted mask, H x W the canvas. Boxes are (x0, y0, x1, y1) with continuous edges and no
`+1`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one canvas with their objects, padded to fixed shapes.

    images: uint8 (B, 3, H, W), RGB, zero outside each image's own size.
    sizes: int64 (B, 2), height and width of each resized image within the canvas.
    original_sizes: int64 (B, 2), height and width of the image file; predictions are returned in
    these pixels.
    sample_ids: int64 (B,), COCO image ids.
    noise_keys: int64 (B,), hash of (seed, epoch, sample id): all randomness of a sample is drawn
    from it.
    boxes_xyxy: float32 (B, G, 4), canvas pixels. labels: int64 (B, G) in [0, K). valid: bool (B,
    G), padding last.
    mask_crops: uint8 (B, G, S, S) of 0 and 1, each object's mask sampled over its own box; S is 0
    without masks.
    keypoints: float32 (B, G, P, 3) as (x, y, COCO visibility), canvas pixels with the half-pixel
    shift applied; P is 0 without keypoints.
    proposals_xyxy: float32 (B, Q, 4), canvas pixels, best first, zero boxes as padding; Q is 0 when
    the RPN proposes.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    sample_ids: Tensor
    noise_keys: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    valid: Tensor
    mask_crops: Tensor
    keypoints: Tensor
    proposals_xyxy: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass(frozen=True)
class LossTerm:
    """One named loss over a batch: `weight * sum / count`, where the caller first adds `count` over
    all ranks.

    sum: scalar with gradients (zero, yet attached, when nothing contributes). count: scalar without
    gradients.
    """

    # A sum and a count, not a mean: only the whole global batch knows what to divide by.
    sum: Tensor
    count: Tensor
    weight: float


@dataclass(frozen=True)
class Detections:
    """Predictions of a batch, padded to D per image, best first; `valid` is False on padding.

    boxes_xyxy: float32 (B, D, 4), in pixels of the image file. scores: (B, D). labels: int64 (B, D)
    in [0, K).
    masks: inference name -> float (B, D, M, M) over each box; a pixel belongs to the object where
    the pasted value reaches 0.5. The configured inference comes first; empty without a mask branch.
    keypoints: float32 (B, D, P, 3) as (x, y, score) in pixels of the image file, half-pixel shift
    undone.
    image_sizes: int64 (B, 2), height and width of the image files. sample_ids: int64 (B,).
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    masks: dict[str, Tensor]
    keypoints: Tensor
    image_sizes: Tensor
    sample_ids: Tensor
