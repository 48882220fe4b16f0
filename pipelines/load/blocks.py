"""Batches in shared memory that workers fill again and again.

Fresh shared memory costs as much as decoding the images in it: the kernel clears every page at its first touch. So a
worker keeps its blocks, one for each batch. The first byte of a block says whether a batch of it is alive: the worker
sets it, and the consumer clears it when the last tensor is gone. Blocks have no name, so a crash leaves nothing behind.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.structures import Batch

ALIGNMENT = (
    64  # bytes; tensors start at multiples of it, the first after the byte that says "alive"
)
CAPACITY_STEP = (
    1 << 22
)  # bytes; capacities are multiples of it, so that batches of like size fit into the same blocks

Allocate = Callable[[int], Tensor]  # a number of bytes -> uint8 of that many, of any value


def private_block(size: int) -> Tensor:
    """Memory of this process."""
    return torch.empty(size, dtype=torch.uint8)


def carve(
    allocate: Allocate, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """Tensors of these types and shapes in one block, of any value."""
    places: dict[str, slice] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + prod(shape) * dtype.itemsize
        places[name] = slice(start, end)
    block = allocate(end)
    return {
        name: block[places[name]].view(dtype).view(shape) for name, (dtype, shape) in shapes.items()
    }


@dataclass(frozen=True)
class Parcel:
    """Batches on their way to the consumer: in which block of which worker, and how each tensor lies in it."""

    sender: int
    contents: tuple[tuple[int, tuple[Any, ...]], ...]  # (block, layout) of each batch
    new: tuple[
        tuple[int, int, Any], ...
    ]  # blocks that the consumer does not know: (block, capacity, file descriptor)
    gone: tuple[int, ...]  # blocks that the worker has given up


class Outbox:
    """A worker's blocks."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._filled: dict[int, int] = {}  # address of a batch's memory -> its block
        self._new: list[int] = []
        self._gone: list[int] = []
        self._count = 0

    def allocate(self, size: int) -> Tensor:
        """Memory of the smallest free block that is large enough, or of a new one in the place of a smaller one."""
        free = sorted(
            (block.capacity, key) for key, block in self._blocks.items() if not block.alive
        )
        fitting = [key for capacity, key in free if capacity >= size + ALIGNMENT]
        key = fitting[0] if fitting else self._create(size, [key for _, key in free][:1])
        block = self._blocks[key]
        block.alive = True
        memory = torch.frombuffer(
            block.map, dtype=torch.uint8, count=max(1, size), offset=ALIGNMENT
        )
        self._filled[memory.data_ptr()] = key
        return memory[:size]

    def _create(self, size: int, outgrown: Sequence[int]) -> int:
        for key in outgrown:
            del self._blocks[key]
            self._gone.append(key)
        self._count += 1
        self._blocks[self._count] = _Block(-(-(size + ALIGNMENT) // CAPACITY_STEP) * CAPACITY_STEP)
        self._new.append(self._count)
        return self._count

    def parcel(self, batches: Sequence[Batch]) -> Parcel:
        """What goes through the queue for batches that were allocated here."""
        contents = tuple(
            (self._filled[b.images.untyped_storage().data_ptr()], _layout(b)) for b in batches
        )
        new = tuple(
            (key, self._blocks[key].capacity, self._blocks[key].hand_over()) for key in self._new
        )
        parcel = Parcel(os.getpid(), contents, new, tuple(self._gone))
        self._filled, self._new, self._gone = {}, [], []
        return parcel


class _Block:
    """A file without a name, mapped. (`mmap` keeps a descriptor: each batch alive costs one here and one there.)"""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._descriptor = _nameless_file()
        os.ftruncate(self._descriptor, capacity)
        self.map = mmap.mmap(self._descriptor, capacity)

    def hand_over(self) -> Any:
        duplicate = DupFd(self._descriptor)
        os.close(self._descriptor)
        return duplicate

    @property
    def alive(self) -> bool:
        return self.map[0] != 0

    @alive.setter
    def alive(self, value: bool) -> None:
        self.map[0] = int(value)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("maskray-batch")
    descriptor, name = tempfile.mkstemp()
    Path(name).unlink()
    return descriptor


class Inbox:
    """The consumer's side of all workers' blocks. Batches stay valid when it is gone."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, parcel: Parcel) -> list[Batch]:
        for key in parcel.gone:
            self._maps.pop((parcel.sender, key), None)
        for key, capacity, duplicate in parcel.new:
            descriptor = duplicate.detach()
            self._maps[parcel.sender, key] = mmap.mmap(descriptor, capacity)
            os.close(descriptor)
        return [_batch(self._maps[parcel.sender, key], layout) for key, layout in parcel.contents]


def _release(memory: mmap.mmap, consumer: int) -> None:
    if os.getpid() == consumer:  # a process forked from the consumer has no say
        memory[0] = 0


def _layout(batch: Batch) -> tuple[Any, ...]:
    tensors = [getattr(batch, f.name) for f in fields(batch)]
    return tuple((t.dtype, t.storage_offset(), tuple(t.shape), t.stride()) for t in tensors)


def _batch(memory: mmap.mmap, layout: tuple[Any, ...]) -> Batch:
    """Tensors in the block; when the last of them is gone, so is `owner`, and the worker may fill the block again."""
    owner = np.frombuffer(memory, np.uint8, offset=ALIGNMENT)
    weakref.finalize(owner, _release, memory, os.getpid()).atexit = False
    storage = torch.from_numpy(owner).untyped_storage()
    return Batch(
        *(
            torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
            for dtype, offset, shape, stride in layout
        )
    )
