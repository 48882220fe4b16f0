"""uint8 pixels into what the network reads: resizing at test time, channel order, normalisation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["antialias", "torchvision-detection"]


class Normalise(nn.Module):
    """(pixels - mean) / std in float32, in the network's channel order, rounded as torchvision rounds it."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([m / 255 for m in mean]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([s / 255 for s in std]).view(3, 1, 1), persistent=False)
        self.bgr = bgr

    def forward(self, images: Tensor) -> Tensor:
        """RGB (..., 3, H, W), uint8 or float in 0 to 255."""
        pixels = images.flip(-3) if self.bgr else images
        return (pixels.float() / 255 - self.mean) / self.std


def zero_padding(pixels: Tensor, sizes_B2: Tensor) -> Tensor:
    """(B, 3, H, W) with everything right of or below each image's own size set to 0."""
    height, width = pixels.shape[-2:]
    rows = torch.arange(height, device=pixels.device) < sizes_B2[:, :1]
    columns = torch.arange(width, device=pixels.device) < sizes_B2[:, 1:]
    return pixels * (rows[:, None, :, None] & columns[:, None, None, :])


def test_size(height: int, width: int, short_side_px: int, max_side_px: int, resize: Resize) -> tuple[int, int]:
    """Height and width after scaling the short side to `short_side_px`, the long one to `max_side_px` if that is less.

    Torchvision's detectors round the sides down, the antialiased resize rounds to nearest.
    """
    scale = min(short_side_px / min(height, width), max_side_px / max(height, width))
    if resize == "torchvision-detection":
        return int(height * scale), int(width * scale)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def enter(image: Tensor, normalise: Normalise, size: tuple[int, int], resize: Resize) -> Tensor:
    """A uint8 RGB image (3, H, W) as normalised float (3, *size): antialiased, then normalised; torchvision's
    detectors normalise first and do not antialias.
    """
    if resize == "torchvision-detection":
        return F.interpolate(normalise(image)[None], size=size, mode="bilinear")[0]
    resized: Tensor = normalise(F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0])
    return resized


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(3, H, W) with zeros right and below up to the next multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))
