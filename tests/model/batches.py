"""Padded batches of drawn shapes that models are tested on."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from model.structures import Batch

CROP_SIDE = 56


def random_boxes(shape: tuple[int, ...], seed: int = 0, side: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(*shape, 2, generator=generator) * side
    return torch.cat(
        [start, start + 1 + torch.rand(*shape, 2, generator=generator) * side / 2], dim=-1
    )


def shape_batch(
    images: int = 2,
    objects: int = 3,
    side: int = 128,
    num_classes: int = 4,
    num_keypoints: int = 0,
    seed: int = 0,
    apart: bool = False,
) -> Batch:
    """Discs and diamonds of a colour per class on noise, one crop and `num_keypoints` points for
    each object.

    `apart` gives each of up to four objects a quarter of the image, so that none covers another.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 60, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    slots = max(objects, 1)
    boxes = torch.zeros(images, slots, 4)
    labels = torch.zeros(images, slots, dtype=torch.int64)
    crops = torch.zeros(images, slots, CROP_SIDE, CROP_SIDE, dtype=torch.uint8)
    for image in range(images):
        for slot in range(objects):
            unit = torch.rand(2, generator=generator)
            quarter = torch.tensor([(image + slot) % 2, (slot // 2 + image + slot) % 2])
            centre = side * (0.22 + 0.06 * unit + 0.5 * quarter if apart else 0.25 + 0.5 * unit)
            radius = side * (0.12 + 0.1 * torch.rand((), generator=generator))
            label = int(torch.randint(0, num_classes, (), generator=generator))
            boxes[image, slot] = torch.cat([centre - radius, centre + radius])
            labels[image, slot] = label
            crops[image, slot] = outline(label, CROP_SIDE)
            paint(pixels[image], boxes[image, slot], label)
    unit = torch.rand(images, slots, num_keypoints, 2, generator=generator)
    points = boxes[:, :, None, :2] + unit * (boxes[:, :, None, 2:] - boxes[:, :, None, :2])
    return Batch(
        images=pixels,
        sizes=torch.full((images, 2), side),
        original_sizes=torch.full((images, 2), side),
        sample_ids=torch.arange(images),
        noise_keys=torch.randint(0, 1 << 60, (images,), generator=generator),
        boxes_xyxy=boxes,
        labels=labels,
        valid=torch.ones(images, slots, dtype=torch.bool)
        if objects
        else torch.zeros(images, slots, dtype=torch.bool),
        mask_crops=crops,
        keypoints=torch.cat([points, torch.full((images, slots, num_keypoints, 1), 2.0)], dim=-1),
        proposals_xyxy=torch.zeros(images, 0, 4),
    )


def outline(label: int, side: int) -> Tensor:
    """uint8 (side, side): a disc for even labels, a diamond for odd ones."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = x * x + y * y < 1 if label % 2 == 0 else x.abs() + y.abs() < 1
    return inside.to(torch.uint8)


def paint(pixels: Tensor, box: Tensor, label: int) -> None:
    colour = torch.tensor([255, 90 + 40 * (label % 4), 255 - 60 * (label % 4)], dtype=torch.uint8)
    pixels[:, covered(box, label, pixels.shape[-1])] = colour[:, None]


def covered(box: Tensor, label: int, side: int) -> Tensor:
    """bool (side, side): the pixels whose centres are inside the object."""
    x0, y0, x1, y1 = box.tolist()
    centres = torch.arange(side) + 0.5
    y, x = torch.meshgrid(
        (centres - y0) / (y1 - y0) * 2 - 1, (centres - x0) / (x1 - x0) * 2 - 1, indexing="ij"
    )
    return x * x + y * y < 1 if label % 2 == 0 else x.abs() + y.abs() < 1


def with_padding(batch: Batch, extra: int) -> Batch:
    """The same batch with `extra` more slots of garbage that are not valid."""
    names = ("boxes_xyxy", "labels", "mask_crops", "keypoints")
    padded = {}
    for name in names:
        values = getattr(batch, name)
        garbage = torch.ones(len(values), extra, *values.shape[2:], dtype=values.dtype)
        padded[name] = torch.cat([values, garbage], dim=1)
    valid = torch.cat([batch.valid, torch.zeros(len(batch), extra, dtype=torch.bool)], dim=1)
    return replace(batch, valid=valid, **padded)


def rows(batch: Batch, index: list[int]) -> Batch:
    """The images of `index`, in that order."""
    return replace(batch, **{f.name: getattr(batch, f.name)[index] for f in fields(batch)})
