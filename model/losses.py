"""Losses of the RPN and the heads as sums over RoIs.

The caller divides them by a count of the global batch.

Axes: R RoIs, K classes, M side of a mask, P keypoint types. Weights are 1 for what counts and 0 for
padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Elementwise; beta 0 is the absolute value (Fast R-CNN, equation 3, at beta 1)."""
    size = difference.abs()
    # The quadratic part would divide by 0.
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def class_loss(logits_RC: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
    """Cross-entropy over the K classes and background, summed over RoIs."""
    # In fp32 under autocast too, as every loss here.
    return (F.cross_entropy(logits_RC.float(), target_R, reduction="none") * weight_R).sum()


def box_loss(offsets_R4: Tensor, target_R4: Tensor, weight_R: Tensor, beta: float) -> Tensor:
    """Smooth L1 of the offsets, summed over coordinates and RoIs."""
    return (smooth_l1(offsets_R4.float() - target_R4, beta).sum(dim=1) * weight_R).sum()


def sigmoid_mask_loss(logits_RMM: Tensor, target_RMM: Tensor, weight_R: Tensor) -> Tensor:
    """Binary cross-entropy of each RoI's own class (Mask R-CNN, section 3).

    The mean over a RoI's pixels, summed over RoIs.
    """
    loss = F.binary_cross_entropy_with_logits(logits_RMM.float(), target_RMM, reduction="none")
    return (loss.mean(dim=(1, 2)) * weight_R).sum()


def softmax_mask_loss(logits_RCMM: Tensor, target_RMM: Tensor, weight_R: Tensor) -> Tensor:
    """Cross-entropy per pixel over K classes and background, the last channel.

    The mean over a RoI's pixels, summed over RoIs.
    """
    # In fp32 under autocast too.
    loss = F.cross_entropy(logits_RCMM.float(), target_RMM, reduction="none")
    return (loss.mean(dim=(1, 2)) * weight_R).sum()


def keypoint_loss(logits_RPMM: Tensor, target_RP: Tensor, weight_RP: Tensor) -> Tensor:
    """Cross-entropy over the M x M positions of each keypoint, summed (Mask R-CNN, section 5)."""
    loss = F.cross_entropy(
        logits_RPMM.float().flatten(2).flatten(0, 1), target_RP.flatten(), reduction="none"
    )
    return (loss * weight_RP.flatten()).sum()
