"""A loader's batches on the device, copied one item ahead of the training.

A worker's block is registered with CUDA, so that a copy out of it neither waits nor is staged. The
host may not let go of a batch before its copy has ended: a worker would fill the block meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from model.structures import Batch
from pipelines.load.blocks import Register, Undo, unregistered
from workers.tracking.spool import print_warning

Batches = list[Batch]


class Transfer(Protocol):
    """A copy of some batches to the device, under way or done."""

    def done(self) -> bool:
        """Whether nothing reads the host's batches any more. Never waits."""

    def wait(self) -> None:
        """The host waits until it is done."""

    def receive(self) -> Batches:
        """The batches on the device. The device waits for them, the host does not."""


class Prefetcher:
    """Iterating yields the items in their order, with their batches on the device.

    Close it before the loader: until then a copy may still read a worker's block.
    """

    def __init__(self, items: Iterable[Batches], copy: Callable[[Batches], Transfer]) -> None:
        self._items, self._copy = iter(items), copy
        # an error of the next item belongs to the next step, not to this one
        self._ahead: Transfer | Exception | None = None
        self._held: list[tuple[Batches, Transfer]] = []

    def __iter__(self) -> Iterator[Batches]:
        return self

    def __next__(self) -> Batches:
        self._held = [(batches, copy) for batches, copy in self._held if not copy.done()]
        transfer = self._ahead or self._next_copy()
        self._ahead = transfer
        if isinstance(transfer, Exception):
            raise transfer
        self._ahead = self._next_copy()
        return transfer.receive()

    def _next_copy(self) -> Transfer | Exception:
        try:
            batches = next(self._items)
            transfer = self._copy(batches)
        except Exception as error:  # noqa: BLE001 - raised when its item is due
            return error
        self._held.append((batches, transfer))
        return transfer

    def close(self) -> None:
        """Waits for the copies under way."""
        for _, transfer in self._held:
            with suppress(RuntimeError):  # a device that failed has said so, or will
                transfer.wait()
        self._held, self._ahead = [], None


class _CudaTransfer:
    def __init__(self, batches: Batches, device: torch.device, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._buffers, self._batches = _copied(batches, device)
            self._event = stream.record_event()

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def receive(self) -> Batches:
        current = torch.cuda.current_stream()
        current.wait_event(self._event)
        for buffer in self._buffers:
            # the memory is the side stream's: it may not be reused there while a step reads it
            buffer.record_stream(current)
        # whoever holds a transfer until its copy has ended does not hold the device's memory
        batches, self._batches, self._buffers = self._batches, [], []
        return batches


def _copied(batches: Batches, device: torch.device) -> tuple[list[Tensor], Batches]:
    """The batches on `device`, and the memory that holds them.

    A batch of our loader lies in one block and is copied as one, not tensor by tensor.
    """
    buffers: list[Tensor] = []
    moved: Batches = []
    for batch in batches:
        tensors: list[Tensor] = [getattr(batch, field.name) for field in fields(batch)]
        reached: dict[int, Tensor] = {}  # address of a storage -> the tensor that ends last in it
        for tensor in tensors:
            address = _address(tensor)
            if address not in reached or _end(tensor) > _end(reached[address]):
                reached[address] = tensor
        copies = {address: _copy_up_to(tensor, device) for address, tensor in reached.items()}
        buffers += copies.values()
        moved.append(Batch(*(_placed(tensor, copies[_address(tensor)]) for tensor in tensors)))
    return buffers, moved


def _copy_up_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The bytes of a tensor's storage up to the tensor's end, copied to `device` without a wait."""
    source = torch.empty(0, dtype=torch.uint8)
    source.set_(tensor.untyped_storage(), 0, (_end(tensor),), (1,))
    # a block that is not registered goes through torch's own pinned memory
    pinned = source if source.is_pinned() else source.pin_memory()
    return pinned.to(device, non_blocking=True, copy=True)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _end(tensor: Tensor) -> int:
    """The byte of its storage at which a tensor ends."""
    if tensor.numel() == 0:
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in strides)
    return (last + 1) * tensor.itemsize


def _placed(tensor: Tensor, buffer: Tensor) -> Tensor:
    """The tensor that lies in `buffer` as `tensor` lies in its own storage."""
    placed = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
    if tensor.numel() == 0:  # its place may be behind the last byte that was copied
        return placed.new_empty(tensor.shape)
    return placed.set_(
        buffer.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


class OnHost:
    """The items as they are, for a training on the CPU."""

    def __init__(self, items: Iterable[Batches]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[Batches]:
        return self

    def __next__(self) -> Batches:
        return next(self._items)

    def close(self) -> None:
        """Nothing is under way."""


DeviceBatches: TypeAlias = Prefetcher | OnHost


def on_device(items: Iterable[Batches], device: torch.device) -> DeviceBatches:
    """The items with their batches on `device`, which the loader's process does not wait for."""
    if device.type != "cuda":
        return OnHost(items)
    stream = _side_stream(device)
    return Prefetcher(items, lambda batches: _CudaTransfer(batches, device, stream))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One in a process: the allocator keeps the free memory of each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


# --- blocks that CUDA reads directly ---


def registration(device: torch.device) -> Register:
    """What registers a loader's blocks with CUDA; on a CPU there is nothing to register."""
    if device.type != "cuda":
        return unregistered
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return PinnedBlocks(
        device,
        lambda address, size: int(cudart.cudaHostRegister(address, size, 0)),
        lambda address: int(cudart.cudaHostUnregister(address)),
    )


class PinnedBlocks:
    """Page-locks blocks of shared memory, so that the device reads them without a staging copy."""

    def __init__(
        self,
        device: torch.device,
        lock: Callable[[int, int], int],
        unlock: Callable[[int], int],
    ) -> None:
        """lock, unlock: `cudaHostRegister` and `cudaHostUnregister`, which return 0 or an error."""
        self._device, self._lock, self._unlock = device, lock, unlock
        self._refused = False

    def __call__(self, address: int, size: int) -> Undo:
        if self._refused:
            return lambda: None
        error = self._lock(address, size)
        if error:
            self._refused = True
            _forget_error(self._device)
            print_warning(
                f"CUDA cannot page-lock the loader's memory (error {error}); each batch is copied "
                "once more on the host. Raise the limit of locked memory (ulimit -l)"
            )
            return lambda: None
        return lambda: self._end(address)

    def _end(self, address: int) -> None:
        if self._unlock(address):
            _forget_error(self._device)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a refused call, and the next launch would raise it."""
    with suppress(RuntimeError):
        torch.full((1,), 0.0, device=device)
