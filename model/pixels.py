"""From uint8 pixels to the input of the network: size, channel order, normalisation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["antialias", "torchvision-detection"]


class Normalise(nn.Module):
    """(pixels - mean) / std in float32, rounded as in torchvision; channels in network order."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool) -> None:
        """mean, std: of pixels in 0 to 255, in the network's channel order."""
        super().__init__()
        # Not in the state dict: they follow from the config.
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


@dataclass(frozen=True)
class ImageSize:
    """The size of one image at test time, and how it enters the network.

    The short side becomes `short_side_px`; if the long one is then over `max_side_px`, that becomes
    `max_side_px`. The canvas has sides that are multiples of `canvas_multiple_px`.
    """

    short_side_px: int
    max_side_px: int
    canvas_multiple_px: int
    resize: Resize

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image, 1 at least, as the evaluation loader has them.

        Antialiased sizes (`pipelines.load.images`) are rounded half up, as in detectron2;
        torchvision's detectors round down.
        """
        shorter, longer = min(height, width), max(height, width)
        # Two orders of the same operations: they differ in the last bit, and so in a pixel now and
        # then.
        if self.resize == "torchvision-detection":
            scale, half = min(self.short_side_px / shorter, self.max_side_px / longer), 0.0
        else:
            scale, half = self.short_side_px / shorter, 0.5
            if scale * longer > self.max_side_px:
                scale = self.max_side_px / longer
        return max(1, int(height * scale + half)), max(1, int(width * scale + half))

    def enter(self, image: Tensor, normalise: Normalise) -> tuple[Tensor, tuple[int, int]]:
        """A uint8 RGB image (3, H, W) as a normalised canvas (1, 3, H', W'), and its size there."""
        size = self.of(*image.shape[-2:])
        if self.resize == "torchvision-detection":
            # Torchvision's detectors normalise first and do not antialias.
            pixels = F.interpolate(normalise(image)[None], size=size, mode="bilinear")
        else:
            pixels = normalise(antialiased(image, size))
        # Zeros after the normalisation: in training, padding is zero for the network too.
        right, below = (-side % self.canvas_multiple_px for side in (size[1], size[0]))
        return F.pad(pixels, (0, right, 0, below)), size


def antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (3, H, W) of another size, uint8 (1, 3, *size)."""
    # Only the CPU resizes uint8. Another device gives the same levels, now and then one beside it.
    resized = _antialiased if image.device.type == "cpu" else antialiased_in_floats
    return resized(image[None], size)


def antialiased_in_floats(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As torch's kernel for uint8, which rounds each row to levels before it adds the rows up."""
    rows = _antialiased(images.float(), (images.shape[-2], size[1]))
    return _levels(_antialiased(_levels(rows).float(), size))


def _levels(values: Tensor) -> Tensor:
    """Rounded half up to uint8."""
    return (values + 0.5).clamp(0, 255).to(torch.uint8)


def _antialiased(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def check_image(image: Tensor) -> None:
    """Raises ValueError unless `image` is what `predict_image` takes."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        kind = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
        raise ValueError(f"an image is uint8 RGB (3, H, W) in 0 to 255; this is {kind}")
