"""RoIs on their way through the heads: padded per image, then as one flat list.

Axes: B images, S slots an image, R RoIs of the flat list, G objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The RoIs that train the heads, padded to S slots an image.

    Positives are in the first `most_positives` slots.

    rois_xyxy: (B, S, 4) canvas pixels. labels: (B, S) in [0, K), and K for background. objects: (B,
    S), the index of the matched object. valid, positive: bool (B, S). keys: int64 (B, S), what
    noise of this RoI is drawn from.
    """

    rois_xyxy: Tensor
    labels: Tensor
    objects: Tensor
    valid: Tensor
    positive: Tensor
    keys: Tensor
    most_positives: int


@dataclass(frozen=True)
class FlatRoIs:
    """R RoIs of all images.

    slot: index into the (B x S) slots. weight: 1, or 0 for padding and for RoIs that do not count.
    """

    slot: Tensor
    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    objects: Tensor
    keys: Tensor
    weight: Tensor

    def with_image(self) -> Tensor:
        """(R, 5) as RoI operations take them."""
        return torch.cat([self.image[:, None].to(self.boxes_xyxy.dtype), self.boxes_xyxy], dim=1)


def flatten(samples: Samples, active_BS: Tensor, slots: int, keep_padding: bool) -> FlatRoIs:
    """The first `slots` of every image as one list, weighted by `active_BS`.

    Inactive ones are in it only with `keep_padding`.

    Dropping them makes a data-dependent length: free on the CPU, a sync on a GPU.
    """
    images, width = active_BS.shape
    device = active_BS.device
    place = torch.arange(images, device=device)[:, None] * width + torch.arange(
        slots, device=device
    )
    slot = place.flatten() if keep_padding else place[active_BS[:, :slots]]

    # Slots count over whole rows of the padded tensors, also where only the first few are read.
    def take(values: Tensor) -> Tensor:
        return values[:, :slots].flatten(0, 1) if keep_padding else values.flatten(0, 1)[slot]

    return FlatRoIs(
        slot=slot,
        image=torch.div(slot, width, rounding_mode="floor"),
        boxes_xyxy=take(samples.rois_xyxy),
        labels=take(samples.labels),
        objects=take(samples.objects),
        keys=take(samples.keys),
        weight=take(active_BS).to(samples.rois_xyxy.dtype),
    )
