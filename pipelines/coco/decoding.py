"""From the bytes of a JPEG or PNG file to RGB pixels. Needs no torch, so packing starts fast."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.coco.remarks import RemarkKind

_EXIF_ORIENTATION = 0x0112  # the number of EXIF's tag
_JPEG = b"\xff\xd8"
_USES_16_BITS = 1 << 12  # a camera of 12 bits stays below it, in a file of 16
MAX_MEGAPIXELS = 180  # 540 MB of RGB
# Pillow warns at 89 megapixels and refuses at 179. Here there is one bound, with one message.
Image.MAX_IMAGE_PIXELS = None


# Whether the annotations mean the pixels as they are stored, or turned as EXIF says.
Exif = Literal["apply", "ignore"]


class TooLargeError(RuntimeError):
    """A sound image of more pixels than are decoded."""


# The only warning of libjpeg after which every pixel is as it was written.
_HARMLESS = "extraneous bytes before marker"


def decode_pixels(content: bytes | memoryview) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) as the file has them. Grayscale is repeated, alpha dropped, CMYK converted.

    Raises RuntimeError if the file cannot be read whole.
    """
    return decode_with_remark(content)[0]


def decode_with_remark(
    content: bytes | memoryview,
) -> tuple[NDArray[np.uint8], RemarkKind | None]:
    """As `decode_pixels`, and what is odd about the file."""
    # torchvision.io is as fast, but deprecated since 0.29, and would need torch.
    try:
        return _jpeg_pixels(content) if bytes(content[:2]) == _JPEG else _png_pixels(content)
    except TooLargeError:
        raise
    except Exception as error:  # decoders fail on damaged bytes in many ways
        raise RuntimeError(str(error) or type(error).__name__) from error


def _jpeg_pixels(content: bytes | memoryview) -> tuple[NDArray[np.uint8], RemarkKind | None]:
    height, width, colour = simplejpeg.decode_jpeg_header(content)[:3]
    _check_size(width, height)
    if colour in ("CMYK", "YCCK"):  # simplejpeg gives no RGB of four channels
        return _by_pillow(content)[0], None
    try:
        return np.asarray(simplejpeg.decode_jpeg(content, "RGB")), None
    except ValueError as error:
        if _HARMLESS not in str(error):
            raise
    # Pillow refuses a file that ends too early, which may hide behind the harmless warning.
    return _by_pillow(content)[0], "stray_bytes"


def _png_pixels(content: bytes | memoryview) -> tuple[NDArray[np.uint8], RemarkKind | None]:
    pixels, brightest = _by_pillow(content)
    return pixels, "twelve_bits" if 0 < brightest < _USES_16_BITS else None


def _by_pillow(content: bytes | memoryview) -> tuple[NDArray[np.uint8], int]:
    """PNG of any kind and JPEG of four channels; with the brightest value of 16-bit grayscale."""
    # Pillow opens dozens of formats; datasets here hold JPEG and PNG.
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        _check_size(*image.size)  # before the pixels take memory
        if image.mode.startswith("I"):  # 16-bit grayscale
            values = np.asarray(image)
            pixels = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return pixels, int(values.max(initial=0))
        return np.array(image.convert("RGB")), 0


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise TooLargeError(
            f"{width} x {height} pixels, more than the {MAX_MEGAPIXELS} megapixels allowed"
        )


@dataclass(frozen=True)
class Stored:
    """What the header of an image file says.

    bare: width and height of the pixels as they are stored. orientation: of its EXIF block, 1 to 8.
    """

    bare: tuple[int, int]
    orientation: int

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height once the orientation is applied: from 5 on the sides are swapped."""
        return (self.bare[1], self.bare[0]) if self.orientation >= 5 else self.bare

    def meant(self, size: tuple[int, int]) -> Exif | None:
        """What a size in the JSON says of the orientation; None where it fits both or neither."""
        if self.turned == self.bare or size not in (self.turned, self.bare):
            return None
        return "apply" if size == self.turned else "ignore"


def read_header(content: bytes) -> Stored:
    """Raises OSError if the header cannot be read, TooLargeError for more pixels than allowed."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            _check_size(*image.size)
            return Stored(image.size, _exif_orientation(image))
    except UnidentifiedImageError:
        raise OSError("neither JPEG nor PNG, or damaged at its start") from None
    except TooLargeError:
        raise
    except Exception as error:  # decoders fail on damaged bytes in many ways
        raise OSError(str(error) or type(error).__name__) from error


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
