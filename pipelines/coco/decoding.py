"""From the bytes of a JPEG or PNG file to RGB pixels. Needs no torch, so packing starts fast."""

from __future__ import annotations

import io
import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112  # the number of EXIF's tag
_JPEG = b"\xff\xd8"
MAX_MEGAPIXELS = 180  # 540 MB of RGB
# Pillow warns at 89 megapixels and refuses at 179. Here there is one bound, with one message.
Image.MAX_IMAGE_PIXELS = None


class TooLargeError(RuntimeError):
    """A sound image of more pixels than are decoded."""


def decode_pixels(content: bytes | memoryview) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) as the file has them. Grayscale is repeated, alpha dropped, CMYK converted.

    Raises RuntimeError if the file cannot be read whole.
    """
    # torchvision.io is as fast, but deprecated since 0.29, and would need torch.
    try:
        return _jpeg_pixels(content) if bytes(content[:2]) == _JPEG else _any_pixels(content)
    except TooLargeError:
        raise
    except Exception as error:  # decoders fail on damaged bytes in many ways
        raise RuntimeError(str(error) or type(error).__name__) from error


def _jpeg_pixels(content: bytes | memoryview) -> NDArray[np.uint8]:
    height, width, colour = simplejpeg.decode_jpeg_header(content)[:3]
    _check_size(width, height)
    if colour in ("CMYK", "YCCK"):  # simplejpeg gives no RGB of four channels
        return _any_pixels(content)
    return np.asarray(simplejpeg.decode_jpeg(content, "RGB"))


def _any_pixels(content: bytes | memoryview) -> NDArray[np.uint8]:
    """By Pillow: PNG of any kind, and JPEG of four channels."""
    # Pillow opens dozens of formats; datasets here hold JPEG and PNG.
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        _check_size(*image.size)  # before the pixels take memory
        if image.mode.startswith("I"):  # 16-bit grayscale
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise TooLargeError(
            f"{width} x {height} pixels, more than the {MAX_MEGAPIXELS} megapixels allowed"
        )


def stored_orientation(content: bytes, width: int, height: int) -> tuple[int, tuple[int, int]]:
    """The orientation to apply so that the file has (width, height), and the size that results.

    The EXIF orientation counts, as in detectron2 and browsers, unless only the bare pixels have the
    size that the JSON gives. Raises OSError if the header cannot be read, TooLargeError for more
    pixels than are decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            _check_size(*image.size)
            bare, orientation = image.size, _exif_orientation(image)
    except UnidentifiedImageError:
        raise OSError("neither JPEG nor PNG, or damaged at its start") from None
    except TooLargeError:
        raise
    except Exception as error:  # decoders fail on damaged bytes in many ways
        raise OSError(str(error) or type(error).__name__) from error
    turned = (bare[1], bare[0]) if orientation >= 5 else bare  # from 5 on the sides are swapped
    if turned != (width, height) and bare == (width, height):
        return 1, bare
    return orientation, turned


def _exif_orientation(image: Image.Image) -> int:
    """1 where there is none, or where the EXIF block is damaged: the pixels may still be whole."""
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except (
        ArithmeticError,
        LookupError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ):
        return 1
    return orientation if 1 <= orientation <= 8 else 1
