"""Samples to a padded `Batch`. Canvas and padding come from the global batch, so they are the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.structures import Batch
from pipelines.sample import Sample

OBJECT_COUNTS = (0, 4, 8, 16, 32, 64, 128, 256)  # the number of objects is padded up to one of these


@dataclass(frozen=True)
class Padding:
    """The shapes that a global batch shares."""

    height: int
    width: int
    objects: int
    mask_side: int
    num_keypoints: int
    num_proposals: int


def padded_count(count: int) -> int:
    return next((size for size in OBJECT_COUNTS if size >= count), -(-count // 256) * 256)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def collate(samples: Sequence[Sample], padding: Padding, proposals: Sequence[np.ndarray] = ()) -> Batch:
    """proposals: for each sample float (Q, 4), canvas pixels, best first; none when the RPN proposes."""
    count, objects = len(samples), padding.objects
    images = torch.empty(count, padding.height, padding.width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    boxes = torch.zeros(count, objects, 4)
    labels = torch.zeros(count, objects, dtype=torch.int64)
    valid = torch.zeros(count, objects, dtype=torch.bool)
    crops = torch.zeros(count, objects, padding.mask_side, padding.mask_side, dtype=torch.uint8)
    keypoints = torch.zeros(count, objects, padding.num_keypoints, 3)
    padded = torch.zeros(count, padding.num_proposals, 4)
    for place, sample in enumerate(samples):
        _put_image(images[place], sample.image)
        number = len(sample.labels)
        boxes[place, :number] = torch.from_numpy(sample.boxes_xyxy)
        labels[place, :number] = torch.from_numpy(sample.labels)
        valid[place, :number] = True
        if padding.mask_side:
            crops.numpy()[place, :number] = sample.masks
        if padding.num_keypoints:
            keypoints[place, :number] = torch.from_numpy(sample.keypoints)
        if padding.num_proposals:
            padded[place, : len(proposals[place])] = torch.from_numpy(proposals[place])
    return Batch(
        images=images,
        sizes=torch.tensor([sample.image.shape[1:] for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        sample_ids=torch.tensor([sample.image_id for sample in samples]),
        noise_keys=torch.tensor([sample.noise_key for sample in samples]),
        boxes_xyxy=boxes,
        labels=labels,
        valid=valid,
        mask_crops=crops,
        keypoints=keypoints,
        proposals_xyxy=padded,
    )


def _put_image(canvas: Tensor, image: Tensor) -> None:
    """Copies into the corner and zeroes the rest, touching each byte once; both are channels last in memory."""
    _, height, width = image.shape
    canvas[:, :height, :width] = image
    canvas[:, height:] = 0
    canvas[:, :height, width:] = 0
