"""Batches in shared memory that workers fill again and again.

Fresh shared memory costs as much as decoding the images in it: the kernel clears every page at
its first touch. So a worker keeps its blocks, one for each batch. The first byte of a block says
whether a batch in it is alive: the worker sets the byte, and the consumer clears it when the last
tensor is gone. Blocks have no name, so a crash leaves nothing behind.
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
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model.structures import Batch

# Bytes. Tensors start at multiples of it, the first one after the byte that says "alive".
ALIGNMENT = 64
# Bytes. Capacities are multiples of it, so that batches of similar size fit into the same blocks.
CAPACITY_STEP = 1 << 22

Allocate = Callable[[int], Tensor]  # a number of bytes -> uint8 of that many, of any value
Undo = Callable[[], None]
# (address, bytes) of a block, once in its life -> what ends the registration.
Register = Callable[[int, int], Undo]


def unregistered(_address: int, _size: int) -> Undo:
    """For a consumer that copies its batches to no device."""
    return lambda: None


def private_block(size: int) -> Tensor:
    """Memory of this process alone, for a loader without workers."""
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


class _Layout(NamedTuple):
    """How one tensor of a batch lies in its block, as `torch.Tensor.set_` takes it."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Duplicate(Protocol):
    """A file descriptor on its way to another process: `multiprocessing.reduction.DupFd`."""

    def detach(self) -> int: ...


class _NewBlock(NamedTuple):
    """A block that the consumer does not know yet."""

    key: int
    capacity: int
    descriptor: _Duplicate


@dataclass(frozen=True)
class Parcel:
    """What goes through the queue for batches: no pixels, only where they lie.

    sender: the worker's process id. contents: block and tensors of each batch. gone: blocks that
    the worker has given up.
    """

    sender: int
    contents: tuple[tuple[int, tuple[_Layout, ...]], ...]
    new: tuple[_NewBlock, ...]
    gone: tuple[int, ...]


class Outbox:
    """A worker's blocks. `allocate` hands out memory, `parcel` describes what was put there."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._filled: dict[int, int] = {}  # address of a batch's memory -> its block
        self._new: list[int] = []
        self._gone: list[int] = []
        self._count = 0

    def allocate(self, size: int) -> Tensor:
        """Memory of the smallest free block that is large enough.

        Without such a block a new one takes the place of the smallest free block.
        """
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
        blocks = ((key, self._blocks[key]) for key in self._new)
        new = tuple(_NewBlock(key, block.capacity, block.hand_over()) for key, block in blocks)
        parcel = Parcel(os.getpid(), contents, new, tuple(self._gone))
        self._filled, self._new, self._gone = {}, [], []
        return parcel


class _Block:
    """A mapped file without a name."""

    # `mmap` keeps a descriptor of its own: each batch alive costs one here and one at the consumer.

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._descriptor = _nameless_file()
        os.ftruncate(self._descriptor, capacity)
        self.map = mmap.mmap(self._descriptor, capacity)

    def hand_over(self) -> _Duplicate:
        """The descriptor for the consumer. It can be sent once."""
        duplicate: _Duplicate = DupFd(self._descriptor)
        os.close(self._descriptor)
        return duplicate

    @property
    def alive(self) -> bool:
        """Whether the consumer still holds a tensor of the batch."""
        return self.map[0] != 0

    @alive.setter
    def alive(self, value: bool) -> None:
        self.map[0] = int(value)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("maskray-batch")
    descriptor, name = tempfile.mkstemp()  # macOS has no memfd
    Path(name).unlink()
    return descriptor


class _Mapped(NamedTuple):
    memory: mmap.mmap
    unregister: Undo


class Inbox:
    """The consumer's side of all workers' blocks. Batches stay valid when it is gone.

    register: sees every block once. Whoever reads a batch in another way than by its tensors, as a
    device does, holds the tensors as long: a worker gives up or fills a block without them.
    """

    def __init__(self, register: Register = unregistered) -> None:
        self._register = register
        self._blocks: dict[tuple[int, int], _Mapped] = {}

    def open(self, parcel: Parcel) -> list[Batch]:
        """The batches of a parcel, as views of its blocks."""
        for key in parcel.gone:
            block = self._blocks.pop((parcel.sender, key), None)
            if block is not None:
                block.unregister()
        for key, capacity, duplicate in parcel.new:
            descriptor = duplicate.detach()
            memory = mmap.mmap(descriptor, capacity)
            os.close(descriptor)
            address = np.frombuffer(memory, np.uint8).ctypes.data
            unregister = self._register(address, capacity)
            self._blocks[parcel.sender, key] = _Mapped(memory, unregister)
        return [
            _batch(self._blocks[parcel.sender, key].memory, layout)
            for key, layout in parcel.contents
        ]

    def close(self) -> None:
        """Ends the registration of every block; nothing may read them by it any more."""
        for block in self._blocks.values():
            block.unregister()
        self._blocks.clear()


def _release(memory: mmap.mmap, consumer: int) -> None:
    # A process that was forked from the consumer runs this too, while the consumer still reads.
    if os.getpid() == consumer:
        memory[0] = 0


def _layout(batch: Batch) -> tuple[_Layout, ...]:
    tensors: list[Tensor] = [getattr(batch, field.name) for field in fields(batch)]
    return tuple(
        _Layout(t.dtype, int(t.storage_offset()), tuple(t.shape), t.stride()) for t in tensors
    )


def _batch(memory: mmap.mmap, layout: tuple[_Layout, ...]) -> Batch:
    """Tensors in the block."""
    # All tensors share `owner`. With the last of them it goes, and the worker may use the block.
    owner = np.frombuffer(memory, np.uint8, offset=ALIGNMENT)
    # Not at exit: the block ends with the process anyway.
    weakref.finalize(owner, _release, memory, os.getpid()).atexit = False
    storage = torch.from_numpy(owner).untyped_storage()
    return Batch(
        *(
            torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
            for dtype, offset, shape, stride in layout
        )
    )
