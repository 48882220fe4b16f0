"""One sample: decoded, resized, flipped, with its objects in the pixels of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from contract.data import DataConfig
from contract.fit import flip_pairs, mirrored
from pipelines.coco.records import CocoCategory
from pipelines.load.images import decode, jitter_colour, resize, resized_size
from pipelines.load.masks import Masks, mask_crops
from pipelines.shards.dataset import Dataset
from pipelines.shards.keyed_random import uniform
from pipelines.shards.rows import Floats, Row

# Purposes of noise. Other numbers would give every run other augmentations.
_FLIP, _SHORT_SIDE = 1, 2


@dataclass(frozen=True)
class Sample:
    """N objects, boxes in pixels of the resized image. masks: (N, S, S). keypoints: (N, P, 3)."""

    image: Tensor
    original_size: tuple[int, int]
    image_id: int
    noise_key: int
    flipped: bool
    boxes_xyxy: Floats
    labels: NDArray[np.int64]
    masks: Masks
    keypoints: Floats


@dataclass(frozen=True)
class Wanted:
    """What a run's heads need of an object."""

    masks: bool
    num_keypoints: int
    mirrored: tuple[int, ...]  # keypoint k of a flipped image is keypoint mirrored[k] of the file


def short_sides(cfg: DataConfig, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The short side that each sample draws."""
    drawn = (uniform(keys, _SHORT_SIDE) * len(cfg.short_sides_px)).astype(np.int64)
    return np.asarray(cfg.short_sides_px, np.int64)[drawn]


@dataclass(frozen=True)
class Drawn:
    """What a sample draws of its noise key."""

    key: int
    short_side: int
    flip: bool


def draw(cfg: DataConfig, keys: NDArray[np.int64]) -> list[Drawn]:
    """What each of the samples with these noise keys draws."""
    sides = short_sides(cfg, keys).tolist()
    flips = (uniform(keys, _FLIP) < cfg.flip_probability).tolist()
    return [Drawn(*one) for one in zip(keys.tolist(), sides, flips, strict=True)]


def training_sample(
    cfg: DataConfig, dataset: Dataset, row_number: int, drawn: Drawn, wanted: Wanted
) -> Sample:
    """A pure function of the stored row, the config and what was drawn."""
    row, key, flip = dataset.row(row_number), drawn.key, drawn.flip
    size = resized_size(row.height, row.width, drawn.short_side, cfg.max_side_px)
    image = resize(read_image(row, dataset), *size)
    image = jitter_colour(image, cfg.colour, key)
    boxes, labels, masks, keypoints = objects(dataset, row_number, row, wanted, cfg.mask_crop_side)
    scale = np.array([size[1] / row.width, size[0] / row.height])
    boxes = boxes * np.tile(scale, 2)
    keypoints = scale_keypoints(keypoints, scale)
    if flip:
        image = image.flip(-1)
        boxes = flip_boxes(boxes, size[1])
        masks = masks[:, :, ::-1]  # crops are over their own box, so they flip in place
        keypoints = flip_keypoints(keypoints, size[1], wanted.mirrored)
    return Sample(
        image, (row.height, row.width), row.image_id, key, flip, boxes, labels, masks, keypoints
    )


def read_image(row: Row, dataset: Dataset) -> Tensor:
    """uint8 (3, H, W) as the annotations mean it.

    Raises RuntimeError, which names dataset, image and remedy, if it cannot be decoded.
    """
    try:
        return decode(row.content, row.orientation)
    except RuntimeError as error:
        raise RuntimeError(
            f"{dataset.store.name}: image {row.image_id} cannot be decoded ({error}); run "
            '"maskray data verify" on it'
        ) from error


def objects(
    dataset: Dataset, row_number: int, row: Row, wanted: Wanted, side: int
) -> tuple[Floats, NDArray[np.int64], Masks, Floats]:
    """Boxes (N, 4), labels, mask crops and keypoints (N, P, 3) of the objects that train.

    Positions are pixels of the image file.
    """
    annotations = row.annotations
    chosen, packed_labels = dataset.index.usable_objects(row_number, dataset.selection)
    x, y, w, h = annotations.boxes_xywh[chosen].T
    boxes = np.stack([x, y, x + w, y + h], 1).reshape(-1, 4)
    # Packing keeps boxes that reach over the edge, for evaluation. Training clips them.
    boxes = np.clip(boxes, 0, [row.width, row.height, row.width, row.height])
    # The selection's labels ascend, so the place among them is the view's label.
    labels = np.searchsorted(dataset.selection.labels, packed_labels)
    masks = (
        mask_crops(annotations, chosen, boxes, side)
        if wanted.masks
        else np.zeros((len(chosen), 0, 0), np.uint8)
    )
    keypoints = np.zeros((len(chosen), wanted.num_keypoints, 3))
    for place, number in enumerate(chosen if wanted.num_keypoints else ()):
        points = annotations.keypoints(number).reshape(-1, 3)
        if len(points):
            keypoints[place] = points
    return boxes, labels, masks, keypoints


def scale_keypoints(keypoints: Floats, scale: Floats) -> Floats:
    """From COCO's pixel indices to continuous coordinates, half a pixel on, in the resized image.

    Unlabelled keypoints stay at zero.
    """
    moved = keypoints.copy()
    moved[..., :2] = (keypoints[..., :2] + 0.5) * scale
    moved[keypoints[..., 2] == 0] = 0  # COCO writes 0, 0, 0 for them
    return moved


def flip_boxes(boxes_xyxy: Floats, width: float) -> Floats:
    """Boxes (N, 4) of the mirrored image. Left and right change places, so that x0 <= x1 stays."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([width - x1, y0, width - x0, y1], 1)


def flip_keypoints(keypoints: Floats, width: float, mirrored: tuple[int, ...]) -> Floats:
    """Mirrors positions and swaps left and right."""
    flipped = keypoints[:, list(mirrored)].copy()
    flipped[..., 0] = np.where(flipped[..., 2] > 0, width - flipped[..., 0], 0)
    return flipped


def mirrored_keypoints(
    cfg: DataConfig, categories: Sequence[CocoCategory], count: int
) -> tuple[int, ...]:
    """For each keypoint the one that takes its place in a mirrored image.

    Raises ValueError if the categories do not name `count` keypoints, or name them differently.
    """
    if count == 0:
        return ()
    named = [category.keypoints for category in categories if category.keypoints]
    # One tensor holds the keypoints of all objects, so their categories must share the names.
    if not named or any(names != named[0] for names in named) or len(named[0]) != count:
        lengths = sorted({len(names) for names in named})
        raise ValueError(
            f"model.keypoints.num_keypoints is {count}, the data's categories have "
            f"{lengths or 'no keypoints'}; set it to theirs, and choose one kind of object with "
            "data.filter.categories"
        )
    if cfg.flip_probability == 0:
        return tuple(range(count))
    own = next(category.flip_pairs for category in categories if category.keypoints)
    return mirrored(named[0], flip_pairs(cfg, own))
