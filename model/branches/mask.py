"""The mask branch: heads, targets, the two losses of Table 2b, inferences.

Axes: R RoIs, C channels of the logits, K classes, M mask side, S side of a stored mask crop, G
objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.model import SoftmaxInference
from model.backbone.networks import ConvReLU
from model.branches.paste import paste_all
from model.losses import sigmoid_mask_loss, softmax_mask_loss
from model.roi.samples import FlatRoIs

Paste = Callable[[Tensor, Tensor, int, int], Tensor]  # see `model.branches.paste`


class FCNHead(nn.Module):
    """The convolutional head (Mask R-CNN, Fig. 4).

    `convs` 3 x 3 convolutions, a 2 x 2 deconvolution of stride 2 and a 1 x 1 predictor.
    """

    def __init__(self, in_channels: int, convs: int, width: int, out_channels: int) -> None:
        super().__init__()
        inputs = [in_channels, *[width] * convs]
        self.convs = nn.ModuleList(nn.Conv2d(inputs[i], width, 3, padding=1) for i in range(convs))
        self.deconv = nn.ConvTranspose2d(inputs[-1], width, 2, stride=2)
        self.logits = nn.Conv2d(width, out_channels, 1)
        self.conv_relu = ConvReLU()
        self.product = OwnChannelProduct()

    def forward(self, features: Tensor) -> Tensor:
        """RoI features to all logits, (R, C, M, M)."""
        logits: Tensor = self.logits(self._hidden(features))
        return logits

    def own(self, features: Tensor, channel_R: Tensor) -> Tensor:
        """forward(features)[r, channel[r]], (R, M, M), without computing the other channels."""
        # Rows by `embedding`: the backward pass of an index sorts on a GPU, in 12 launches each.
        weight = F.embedding(channel_R, self.logits.weight.flatten(1))
        own: Tensor = self.product(self._hidden(features), weight)
        assert self.logits.bias is not None
        return own + F.embedding(channel_R, self.logits.bias[:, None])[:, :, None]

    def _hidden(self, features: Tensor) -> Tensor:
        x = features
        for conv in self.convs:
            x = self.conv_relu(conv, x)
        hidden: Tensor = self.conv_relu(self.deconv, x)
        return hidden


class OwnChannelProduct(nn.Module):
    """`own_channel_product` as a part: `model.cpu` has a faster one."""

    def forward(self, hidden_RCMM: Tensor, weight_RC: Tensor) -> Tensor:
        """(R, M, M)."""
        return own_channel_product(hidden_RCMM, weight_RC)


def own_channel_product(hidden_RCMM: Tensor, weight_RC: Tensor) -> Tensor:
    """A 1 x 1 convolution with one output, whose weights are each RoI's own: (R, M, M)."""
    own = torch.bmm(weight_RC[:, None], hidden_RCMM.flatten(2))
    return torch.unflatten(own[:, 0], 1, hidden_RCMM.shape[2:])


class MLPHead(nn.Module):
    """The MLP head: fully connected layers, then all C x M x M logits at once (Table 2e)."""

    def __init__(
        self, in_features: int, layers: int, width: int, out_channels: int, side: int
    ) -> None:
        super().__init__()
        inputs = [in_features, *[width] * layers]
        self.fc = nn.ModuleList(nn.Linear(inputs[i], width) for i in range(layers))
        self.logits = nn.Linear(width, out_channels * side * side)
        self.side = side

    def forward(self, features: Tensor) -> Tensor:
        """RoI features to all logits, (R, C, M, M)."""
        x = features.flatten(1)
        for fc in self.fc:
            x = F.relu(fc(x), inplace=True)
        logits: Tensor = self.logits(x).unflatten(1, (-1, self.side, self.side))
        return logits

    def own(self, features: Tensor, channel_R: Tensor) -> Tensor:
        """forward(features)[r, channel[r]], (R, M, M)."""
        # All channels at once: one large product is faster here than a small one for each RoI.
        return own_channel(self(features), channel_R)


Head: TypeAlias = FCNHead | MLPHead


class Masks(Protocol):
    """What the logits of a head mean: a mask loss.

    A new one is a class with these three methods.
    """

    def logits(self, head: Head, features: Tensor, labels_R: Tensor) -> Tensor:
        """The logits that `loss` and `probabilities` read, of each RoI's features."""
        ...

    def loss(
        self, logits: Tensor, rois: FlatRoIs, object_boxes: Tensor, crops: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss, summed over RoIs.

        object_boxes: (B, G, 4). crops: (B, G, S, S). labels: (B, G).
        """
        ...

    def probabilities(self, logits: Tensor, labels_R: Tensor) -> dict[str, Tensor]:
        """A map (R, M, M) for each inference, by name; the configured one is first.

        A map reaches 0.5 on the object.
        """
        ...


class SigmoidMasks:
    """Independent masks per class, or one for all classes."""

    def __init__(self, num_classes: int, class_agnostic: bool) -> None:
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic

    def logits(self, head: Head, features: Tensor, labels_R: Tensor) -> Tensor:
        """Each RoI's own mask, (R, M, M)."""
        # RoIs of background and padding have no class; they weigh nothing, so any channel will do.
        channel = (
            torch.zeros_like(labels_R)
            if self.class_agnostic
            else labels_R.clamp(max=self.num_classes - 1)
        )
        return head.own(features, channel)

    def loss(
        self,
        logits: Tensor,
        rois: FlatRoIs,
        object_boxes: Tensor,
        crops: Tensor,
        labels: Tensor,  # noqa: ARG002 - `logits` took the channel of the class already
    ) -> Tensor:
        """As `Masks.loss`. logits: (R, M, M)."""
        boxes = object_boxes[rois.image, rois.objects]
        inside = sample_crops(
            crops[rois.image, rois.objects], boxes, rois.boxes_xyxy, logits.shape[-1]
        )
        return sigmoid_mask_loss(logits, inside.to(rois.weight.dtype), rois.weight)

    def probabilities(
        self,
        logits: Tensor,
        labels_R: Tensor,  # noqa: ARG002 - `logits` took the channel of the class already
    ) -> dict[str, Tensor]:
        """The only inference. logits: (R, M, M)."""
        return {"sigmoid": logits.float().sigmoid()}


class SoftmaxMasks:
    """Classes and background (the last channel) compete in every pixel.

    Targets: the RoI's object has its class; pixels outside it are background or, with
    `others_own_class`, the class of another object of the image that covers them (of several, the
    first in the batch's order).
    """

    def __init__(self, others_own_class: bool, inference: SoftmaxInference) -> None:
        self.others_own_class = others_own_class
        names = get_args(SoftmaxInference)
        self.order = (inference, *(other for other in names if other != inference))

    def logits(
        self,
        head: Head,
        features: Tensor,
        labels_R: Tensor,  # noqa: ARG002 - all classes compete, so all are needed
    ) -> Tensor:
        """Every class and background, (R, C, M, M)."""
        logits: Tensor = head(features)
        return logits

    def loss(
        self, logits: Tensor, rois: FlatRoIs, object_boxes: Tensor, crops: Tensor, labels: Tensor
    ) -> Tensor:
        """As `Masks.loss`, of all channels."""
        return softmax_mask_loss(
            logits, self.targets(logits.shape, rois, object_boxes, crops, labels), rois.weight
        )

    def targets(
        self, shape: torch.Size, rois: FlatRoIs, object_boxes: Tensor, crops: Tensor, labels: Tensor
    ) -> Tensor:
        """int64 (R, M, M): a class, or K for background."""
        background, side = shape[1] - 1, shape[-1]
        boxes = object_boxes[rois.image, rois.objects]
        own = sample_crops(crops[rois.image, rois.objects], boxes, rois.boxes_xyxy, side)
        target = torch.full((len(own), side, side), background, device=own.device)
        if self.others_own_class:
            # Backwards, so that the first of several objects is the last to write.
            for g in range(crops.shape[1] - 1, -1, -1):
                other = sample_crops(
                    crops[rois.image, g], object_boxes[rois.image, g], rois.boxes_xyxy, side
                )
                target = torch.where(other, labels[rois.image, g][:, None, None], target)
        return torch.where(own, rois.labels.clamp(max=background)[:, None, None], target)

    def probabilities(self, logits: Tensor, labels_R: Tensor) -> dict[str, Tensor]:
        """As `Masks.probabilities`, for every inference.

        probability: p_k. argmax: p_k / (p_k + the largest other p). versus_background: p_k / (p_k +
        p_background).
        """
        # In fp32 under autocast too: 0.5 decides a pixel, and bf16 has 8 significant bits.
        logits = logits.float()
        own = own_channel(logits, labels_R)
        channel = torch.arange(logits.shape[1], device=logits.device)
        others = logits.masked_fill((channel == labels_R[:, None])[:, :, None, None], -torch.inf)
        maps = {
            "probability": torch.exp(own - logits.logsumexp(dim=1)),
            "argmax": torch.sigmoid(own - others.amax(dim=1)),
            "versus_background": torch.sigmoid(own - logits[:, -1]),
        }
        return {name: maps[name] for name in self.order}


class MaskBranch(nn.Module):
    """A head on the mask features of each RoI, and what its logits mean."""

    def __init__(
        self, head: Head, masks: Masks, side: int, loss_weight: float, paste: Paste = paste_all
    ) -> None:
        """side: of the predicted masks. paste: for `predict_image` alone."""
        super().__init__()
        self.head = head
        self.masks = masks
        self.side = side
        self.loss_weight = loss_weight
        self.paste = paste

    def loss(
        self, features: Tensor, rois: FlatRoIs, object_boxes: Tensor, crops: Tensor, labels: Tensor
    ) -> Tensor:
        """As `Masks.loss`, of RoI features."""
        logits = self.masks.logits(self.head, features, rois.labels)
        return self.masks.loss(logits, rois, object_boxes, crops, labels)

    def probabilities(self, features: Tensor, labels_R: Tensor) -> dict[str, Tensor]:
        """As `Masks.probabilities`, of RoI features."""
        return self.masks.probabilities(self.masks.logits(self.head, features, labels_R), labels_R)


def own_channel(logits_RCMM: Tensor, channel_R: Tensor) -> Tensor:
    """logits[r, channel[r]], (R, M, M)."""
    index = channel_R[:, None, None, None].expand(-1, 1, *logits_RCMM.shape[2:])
    return logits_RCMM.gather(1, index)[:, 0]


def sample_crops(crops_RSS: Tensor, crop_boxes_R4: Tensor, rois_R4: Tensor, side: int) -> Tensor:
    """Whether the object covers the centre of each cell of a grid over the RoI: bool (R, M, M).

    crops_RSS: uint8, each object's mask sampled over `crop_boxes_R4`; nothing of it lies outside.
    Bilinear between the crop's cell centres, at 0.5.
    """
    start, end = crop_boxes_R4[:, None, :2], crop_boxes_R4[:, None, 2:]
    steps = (torch.arange(side, device=rois_R4.device, dtype=rois_R4.dtype) + 0.5) / side
    points = rois_R4[:, None, :2] + steps[None, :, None] * (
        rois_R4[:, None, 2:] - rois_R4[:, None, :2]
    )
    # (R, M, 2), -1 to 1 over the crop; the clamp keeps padded boxes without an area finite.
    relative = (points - start) / (end - start).clamp(min=1e-6) * 2 - 1
    x, y = (
        relative[:, None, :, 0].expand(-1, side, -1),
        relative[:, :, None, 1].expand(-1, -1, side),
    )
    # The border repeats, and the mask below cuts it: zeros as padding would thin objects at the
    # edge of a crop.
    values = F.grid_sample(
        crops_RSS[:, None].to(rois_R4.dtype),
        torch.stack([x, y], dim=-1),
        padding_mode="border",
        align_corners=False,
    )[:, 0]
    inside = ((relative > -1) & (relative < 1)).to(rois_R4.dtype)
    return values * (inside[:, None, :, 0] * inside[:, :, None, 1]) >= 0.5
