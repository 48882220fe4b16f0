"""From the bytes of a JPEG or PNG file to a uint8 RGB tensor in the orientation that the annotations mean."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pipelines.config import ColourJitter
from pipelines.noise import uniform

_EXIF_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8"


def decode(content: bytes | memoryview, orientation: int) -> Tensor:
    """uint8 (3, H, W), channels last in memory. Grayscale is repeated, alpha dropped, CMYK converted.

    Raises RuntimeError if it cannot be read whole. (torchvision.io, as fast, is deprecated since 0.29.)
    """
    try:
        pixels = _decode_jpeg(content) if bytes(content[:2]) == _JPEG else _decode_any(content)
    except (ValueError, OSError, SyntaxError) as error:
        raise RuntimeError(str(error)) from error
    return reorient(torch.from_numpy(pixels).permute(2, 0, 1), orientation)


def _decode_jpeg(content: bytes | memoryview) -> NDArray[np.uint8]:
    if simplejpeg.decode_jpeg_header(content)[2] in ("CMYK", "YCCK"):
        return _decode_any(content)
    return np.asarray(simplejpeg.decode_jpeg(content, "RGB"))


def _decode_any(content: bytes | memoryview) -> NDArray[np.uint8]:
    """By Pillow: PNG of any kind, and JPEG of four channels."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        if image.mode.startswith("I"):  # 16-bit grayscale
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def reorient(image: Tensor, orientation: int) -> Tensor:
    """Applies an EXIF orientation (1 to 8) to (3, H, W)."""
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


def stored_orientation(content: bytes, width: int, height: int) -> tuple[int, tuple[int, int]]:
    """The orientation to apply so that the file comes out as (width, height), and the size that results.

    The EXIF orientation counts (as detectron2 and browsers have it), unless only the bare pixels have the size that
    the JSON gives. Raises OSError if the header cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
            bare = image.size
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise OSError(str(error)) from None
    orientation = orientation if 1 <= orientation <= 8 else 1
    turned = (bare[1], bare[0]) if orientation >= 5 else bare
    if turned != (width, height) and bare == (width, height):
        return 1, bare
    return orientation, turned


def resized_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width after scaling to the short side, the long one capped; rounded half up as in detectron2."""
    scale = short_side / min(height, width)
    if scale * max(height, width) > max_side:
        scale = max_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def torchvision_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """The same in torchvision's detection transform, which rounds down (GeneralizedRCNNTransform)."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, int(height * scale)), max(1, int(width * scale))


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear on uint8."""
    resized: Tensor = F.resize_image(image, [height, width], antialias=True)
    return resized


def resize_without_antialias(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear on floats, as torchvision's detection transform has it, rounded back to uint8."""
    resized = torch.nn.functional.interpolate(image[None].float(), (height, width), mode="bilinear")[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


_BRIGHTNESS, _CONTRAST, _SATURATION = 11, 12, 13  # purposes of noise


def jitter_colour(image: Tensor, strengths: ColourJitter, key: int) -> Tensor:
    """Brightness, contrast, saturation, each by a factor drawn from [max(0, 1 - s), 1 + s]."""
    for purpose, strength, adjust in (
        (_BRIGHTNESS, strengths.brightness, F.adjust_brightness_image),
        (_CONTRAST, strengths.contrast, F.adjust_contrast_image),
        (_SATURATION, strengths.saturation, F.adjust_saturation_image),
    ):
        if strength > 0:
            low = max(0.0, 1 - strength)
            image = adjust(image, low + (1 + strength - low) * float(uniform(key, purpose)[0]))
    return image
