"""Samples to a padded `Batch`.

Canvas and padding come from the global batch, so they are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.structures import Batch
from pipelines.load.blocks import Allocate, carve, private_block
from pipelines.load.sample import Sample

# The number of objects is padded up to one of these, so that few shapes occur: `torch.compile`
# and CUDA graphs build one program for each.
OBJECT_COUNTS = (0, 4, 8, 16, 32, 64, 128, 256)


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
    """The next of OBJECT_COUNTS, above the largest the next multiple of it."""
    return next((size for size in OBJECT_COUNTS if size >= count), -(-count // 256) * 256)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def collate(
    samples: Sequence[Sample],
    padding: Padding,
    proposals: Sequence[np.ndarray] = (),
    allocate: Allocate = private_block,
) -> Batch:
    """One batch of the samples, in memory from `allocate`.

    proposals: for each sample (Q, 4) in pixels of the canvas, best first; empty when the RPN
    proposes.
    """
    # All tensors of a batch lie in one block, which crosses to the consumer as a whole.
    count = len(samples)
    batch = Batch(**carve(allocate, _shapes(count, padding)))
    batch = replace(batch, images=batch.images.permute(0, 3, 1, 2))
    # Memory comes with any value. Images and mask crops, the large ones, are zeroed only where
    # nothing is copied.
    boxes, points, proposed = batch.boxes_xyxy, batch.keypoints, batch.proposals_xyxy
    for tensor in (boxes, batch.labels, batch.valid, points, proposed):
        tensor.zero_()
    for place, sample in enumerate(samples):
        _put_image(batch.images[place], sample.image)
        number = len(sample.labels)
        batch.sizes[place] = torch.tensor(sample.image.shape[1:])
        batch.original_sizes[place] = torch.tensor(sample.original_size)
        batch.sample_ids[place] = sample.image_id
        batch.noise_keys[place] = sample.noise_key
        batch.boxes_xyxy[place, :number] = torch.from_numpy(sample.boxes_xyxy)
        batch.labels[place, :number] = torch.from_numpy(sample.labels)
        batch.valid[place, :number] = True
        if padding.mask_side:
            batch.mask_crops.numpy()[place, :number] = (
                sample.masks
            )  # a flipped crop has strides < 0
            batch.mask_crops[place, number:] = 0
        if padding.num_keypoints:
            batch.keypoints[place, :number] = torch.from_numpy(sample.keypoints)
        if padding.num_proposals:
            batch.proposals_xyxy[place, : len(proposals[place])] = torch.from_numpy(
                proposals[place]
            )
    return batch


def _shapes(count: int, padding: Padding) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of a batch's tensors. Images are (B, H, W, 3): channels last in memory."""
    objects, side = padding.objects, padding.mask_side
    return {
        "images": (torch.uint8, (count, padding.height, padding.width, 3)),
        "sizes": (torch.int64, (count, 2)),
        "original_sizes": (torch.int64, (count, 2)),
        "sample_ids": (torch.int64, (count,)),
        "noise_keys": (torch.int64, (count,)),
        "boxes_xyxy": (torch.float32, (count, objects, 4)),
        "labels": (torch.int64, (count, objects)),
        "valid": (torch.bool, (count, objects)),
        "mask_crops": (torch.uint8, (count, objects, side, side)),
        "keypoints": (torch.float32, (count, objects, padding.num_keypoints, 3)),
        "proposals_xyxy": (torch.float32, (count, padding.num_proposals, 4)),
    }


def _put_image(canvas: Tensor, image: Tensor) -> None:
    """Copies into the upper left corner and zeroes the rest, so that each byte is touched once.

    Both tensors are channels last in memory.
    """
    _, height, width = image.shape
    canvas[:, :height, :width] = image
    canvas[:, height:] = 0
    canvas[:, :height, width:] = 0
