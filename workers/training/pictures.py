"""The same few validation images at every evaluation: true objects on the left, predicted right."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle_tools
from pydantic import BaseModel

from pipelines.coco.rle import mask_of
from pipelines.load.sample import read_image
from pipelines.shards.dataset import Dataset

NUM_IMAGES = 4
_MIN_SCORE = 0.5
_MAX_SIDE_PX = 480
_GAP_PX = 6
_COLOURS = (
    (230, 57, 70),
    (42, 157, 143),
    (69, 123, 255),
    (244, 162, 97),
    (155, 93, 229),
    (0, 187, 249),
    (254, 228, 64),
)

_BRIGHT = 140  # of 255: text on a brighter ground is black

Pixels = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]


class Drawable(BaseModel):
    """A COCO annotation or result, as far as it is drawn.

    segmentation: any of COCO's forms, None without a mask. bbox: x, y, width, height.
    """

    category_id: int
    score: float | None = None  # an annotation has none
    iscrowd: int = 0
    segmentation: Any = None
    bbox: tuple[float, float, float, float] | None = None
    keypoints: list[float] = []

    @property
    def points(self) -> NDArray[np.float64]:
        """Keypoints (P, 3): x, y, visibility."""
        return np.asarray(self.keypoints, np.float64).reshape(-1, 3)

    def box(self) -> Sequence[float]:
        """x, y, width, height; of the mask or the keypoints where the record has no box."""
        if self.bbox is not None:
            return self.bbox
        if self.segmentation is not None:
            return [float(value) for value in rle_tools.toBbox(self.segmentation)]
        (x0, y0), (x1, y1) = self.points[:, :2].min(axis=0), self.points[:, :2].max(axis=0)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]


def comparison(dataset: Dataset, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG of the dataset's first images, one a row: their annotations beside the `results`.

    results: COCO results by kind; masks are drawn if there are any, else keypoints, else boxes.
    """
    names = {category.id: category.name for category in dataset.categories}
    kind = next(kind for kind in ("segm", "keypoints", "bbox") if kind in results)
    rows = []
    for number in dataset.rows()[:NUM_IMAGES]:
        row = dataset.row(number)
        pixels = read_image(row, dataset).permute(1, 2, 0).numpy()
        predicted = [
            (r["score"], Drawable.model_validate(r))
            for r in results[kind]
            if r["image_id"] == row.image_id and r["score"] >= _MIN_SCORE
        ]
        # the best last, on top of the others
        predicted.sort(key=lambda pair: pair[0])
        annotations = [Drawable.model_validate(a.json()) for a in dataset.annotations(row.image_id)]
        left = drawn(pixels, [a for a in annotations if not a.iscrowd], names)
        right = drawn(pixels, [thing for _, thing in predicted], names)
        rows.append(np.concatenate([left, _gap(left.shape[0], _GAP_PX), right], axis=1))
    if not rows:
        rows = [_gap(16, 16)]
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, ((0, _GAP_PX), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(padded, axis=0)).save(sink, "png")
    return sink.getvalue()


def drawn(
    pixels: Pixels,
    objects: Iterable[Drawable],
    names: Mapping[int, str],
    max_side_px: int = _MAX_SIDE_PX,
    font_px: int = 0,
) -> Pixels:
    """`pixels` (H, W, 3) with the objects' masks, boxes and keypoints.

    The long side of the picture is at most `max_side_px`. font_px: of names on a ground of their
    own; 0 writes them small and bare.
    """
    height, width = pixels.shape[:2]
    canvas = pixels.astype(np.float32)
    coloured = [(thing, _COLOURS[thing.category_id % len(_COLOURS)]) for thing in objects]
    for thing, colour in coloured:
        if thing.segmentation:
            mask = mask_of(thing.segmentation, height, width)
            canvas[mask] = 0.5 * canvas[mask] + 0.5 * np.asarray(colour, np.float32)
    # lines and text after the scaling, so that they stay sharp
    side = max(height, width)
    # names that can be read do not fit on a small image
    least = max(1.0, _MAX_SIDE_PX / side) if font_px else 1.0
    scale = min(least, max_side_px / side)
    image = Image.fromarray(canvas.astype(np.uint8)).resize(
        (max(round(width * scale), 1), max(round(height * scale), 1))
    )
    draw = ImageDraw.Draw(image)
    for thing, colour in coloured:
        x, y, w, h = (value * scale for value in thing.box())
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=max(font_px // 7, 1))
        score = "" if thing.score is None else f" {thing.score:.2f}"
        text = f"{names.get(thing.category_id, '?')}{score}"
        if font_px:
            _label(draw, x, y, text, colour, font_px)
        else:
            draw.text((x + 2, y + 1), text, fill=colour)
        for px, py, seen in thing.points:
            if seen > 0:
                draw.ellipse(
                    (px * scale - 2, py * scale - 2, px * scale + 2, py * scale + 2), fill=colour
                )
    return np.asarray(image)


def _label(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: Colour, font_px: int
) -> None:
    """The text on a ground of the object's colour, above the box where the picture has room."""
    font = ImageFont.load_default(font_px)
    top = y - font_px - 3 if y > font_px + 3 else y
    ground = draw.textbbox((x + 2, top), text, font=font)
    draw.rectangle((x, top, ground[2] + 2, top + font_px + 3), fill=colour)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > _BRIGHT
    draw.text((x + 2, top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _gap(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 255, np.uint8)
