"""All tensors of a batch in one block of memory: a worker fills it once and hands over one file descriptor.

(Eleven tensors are eleven descriptors and eleven copies into shared memory, which cost as much as decoding.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from model.structures import Batch

ALIGNMENT = 64  # bytes; views start at multiples of it

Allocate = Callable[[int], Tensor]  # a number of bytes -> uint8 of that many, of any value


def private_block(size: int) -> Tensor:
    """Memory of this process."""
    return torch.empty(size, dtype=torch.uint8)


def shared_block(size: int) -> Tensor:
    """Memory that another process can map. It has no name once it is there, so a crash leaves nothing behind."""
    storage = torch.UntypedStorage._new_shared(size, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def carve(allocate: Allocate, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of these types and shapes in one block, of any value."""
    places: dict[str, slice] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + prod(shape) * dtype.itemsize
        places[name] = slice(start, end)
    block = allocate(end)
    return {name: block[places[name]].view(dtype).view(shape) for name, (dtype, shape) in shapes.items()}


def _reduce(batch: Batch) -> tuple[Any, ...]:
    """How a batch goes to another process: its block once, and where each tensor lies in it."""
    tensors = [getattr(batch, f.name) for f in fields(batch)]
    storage = batch.images.untyped_storage()
    if any(tensor.untyped_storage().data_ptr() != storage.data_ptr() for tensor in tensors):
        return Batch, tuple(tensors)
    layout = [(tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()) for tensor in tensors]
    return _rebuild, (torch.empty(0, dtype=torch.uint8).set_(storage), layout)


def _rebuild(block: Tensor, layout: list[Any]) -> Batch:
    storage = block.untyped_storage()
    return Batch(
        *(torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride) for dtype, offset, shape, stride in layout)
    )


ForkingPickler.register(Batch, _reduce)
