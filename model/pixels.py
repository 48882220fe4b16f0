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
        self.register_buffer(
            "mean", torch.tensor([m / 255 for m in mean]).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor([s / 255 for s in std]).view(3, 1, 1), persistent=False
        )
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


def test_size(
    height: int, width: int, short_side_px: int, max_side_px: int, resize: Resize
) -> tuple[int, int]:
    """Height and width after scaling the short side to `short_side_px`, the long one to `max_side_px` if that is less.

    As the evaluation loader resizes (`pipelines.load.images`): antialiased ones are rounded half up, as in detectron2,
    torchvision's detectors round down. A side is 1 at least.
    """
    shorter, longer = min(height, width), max(height, width)
    if resize == "torchvision-detection":
        scale, half = min(short_side_px / shorter, max_side_px / longer), 0.0
    else:
        scale, half = short_side_px / shorter, 0.5
        if scale * longer > max_side_px:
            scale = max_side_px / longer
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def check_image(image: Tensor) -> None:
    """Raises ValueError unless `image` is what `predict_image` takes."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        found = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        raise ValueError(f"an image is uint8 RGB (3, H, W) in 0 to 255; this is {found}")


def enter(image: Tensor, normalise: Normalise, size: tuple[int, int], resize: Resize) -> Tensor:
    """A uint8 RGB image (3, H, W) as normalised float (3, *size): antialiased, then normalised; torchvision's
    detectors normalise first and do not antialias.
    """
    if resize == "torchvision-detection":
        return F.interpolate(normalise(image)[None], size=size, mode="bilinear")[0]
    resized: Tensor = normalise(
        F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    )
    return resized


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(3, H, W) with zeros right and below up to the next multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))
