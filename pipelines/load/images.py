"""From the bytes of a JPEG or PNG file to a uint8 RGB tensor.

Its orientation is the one that the annotations mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from contract.data import ColourJitter
from pipelines.coco.decoding import decode_pixels
from pipelines.shards.keyed_random import uniform


def decode(content: bytes | memoryview, orientation: int) -> Tensor:
    """uint8 (3, H, W), channels last in memory. RuntimeError if it cannot be read whole."""
    return reorient(torch.from_numpy(decode_pixels(content)).permute(2, 0, 1), orientation)


def reorient(image: Tensor, orientation: int) -> Tensor:
    """Applies an EXIF orientation (1 to 8) to (3, H, W). From 5 on the sides are swapped."""
    match orientation:
        case 2:
            image = image.flip(-1)
        case 3:
            image = image.flip(-2, -1)
        case 4:
            image = image.flip(-2)
        case 5:
            image = image.transpose(-2, -1)
        case 6:
            image = image.transpose(-2, -1).flip(-1)
        case 7:
            image = image.transpose(-2, -1).flip(-2, -1)
        case 8:
            image = image.transpose(-2, -1).flip(-2)
    return image


def resized_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width after scaling to the short side, with the long side capped.

    Both are rounded half up, as in detectron2.
    """
    scale = short_side / min(height, width)
    if scale * max(height, width) > max_side:
        scale = max_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def torchvision_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width as torchvision's GeneralizedRCNNTransform has them: it rounds down."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear on uint8 (3, H, W)."""
    resized: Tensor = F.resize_image(image, [height, width], antialias=True)
    return resized


def resize_without_antialias(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear on floats, rounded back to uint8: torchvision's detection transform."""
    resized = torch.nn.functional.interpolate(
        image[None].float(), (height, width), mode="bilinear"
    )[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


# Purposes of noise: one key gives an independent number for each. A new number is a new stream.
_BRIGHTNESS, _CONTRAST, _SATURATION = 11, 12, 13


def jitter_colour(image: Tensor, strengths: ColourJitter, key: int) -> Tensor:
    """Brightness, contrast, saturation, each by a factor drawn from [max(0, 1 - s), 1 + s].

    key: the sample's noise key.
    """
    for purpose, strength, adjust in (
        (_BRIGHTNESS, strengths.brightness, F.adjust_brightness_image),
        (_CONTRAST, strengths.contrast, F.adjust_contrast_image),
        (_SATURATION, strengths.saturation, F.adjust_saturation_image),
    ):
        if strength > 0:  # at 0 the image keeps its bytes, and no time is spent
            low = max(0.0, 1 - strength)
            image = adjust(image, low + (1 + strength - low) * float(uniform(key, purpose)[0]))
    return image
