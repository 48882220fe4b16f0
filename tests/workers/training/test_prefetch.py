"""Batches on their way to the device: order, errors, and no block that is filled under a copy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model.structures import Batch
from pipelines.load.blocks import (
    CAPACITY_STEP,
    Allocate,
    Inbox,
    Outbox,
    Parcel,
    carve,
    private_block,
)
from tests.workers.fakes import make_batch
from workers.training.prefetch import PinnedBlocks, Prefetcher, _copied, on_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _pinned(monkeypatch):
    """Without CUDA there is no pinned memory; the copies here take any for pinned."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)


class FakeTransfer:
    """A copy that ends when the test says so."""

    def __init__(self, batches: list[Batch]) -> None:
        self._moved = _copied(batches, CPU)[1]
        self.ended = False
        self.waits = 0

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.waits += 1
        self.ended = True

    def receive(self) -> list[Batch]:
        return self._moved


class Copies(list[FakeTransfer]):
    """The copies in the order in which they were started."""

    def __call__(self, batches: list[Batch]) -> FakeTransfer:
        self.append(FakeTransfer(batches))
        return self[-1]


def numbered(number: int, images: int = 2) -> Batch:
    """In channels-last order, as the loader's batches are."""
    pixels = torch.full((images, 5, 7, 3), number, dtype=torch.uint8).permute(0, 3, 1, 2)
    return make_batch(pixels, torch.full((images,), number))


def sent(outbox: Outbox, number: int, images: int = 2) -> Parcel:
    """What a worker does with a batch."""
    batch = in_one_block(numbered(number, images), outbox.allocate)
    return outbox.parcel([batch])


def in_one_block(batch: Batch, allocate: Allocate) -> Batch:
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in vars(batch).items()}
    copied = carve(allocate, shapes)
    for name, tensor in vars(batch).items():
        copied[name].copy_(tensor)
    return Batch(**copied)


def test_on_the_cpu_the_batches_are_those_of_the_loader():
    items = [[numbered(1)], [numbered(2), numbered(3)]]
    assert [id(b) for item in on_device(items, CPU) for b in item] == [
        id(b) for item in items for b in item
    ]


def test_batches_arrive_in_order_and_equal_one_copy_ahead():
    items = [[numbered(1)], [numbered(2), numbered(3, images=1)], [numbered(4)]]
    copies = Copies()
    stream = Prefetcher(items, copies)
    for index, item in enumerate(items):
        for copied, batch in zip(next(stream), item, strict=True):
            for name, tensor in vars(batch).items():
                moved = getattr(copied, name)
                assert moved.dtype == tensor.dtype
                assert moved.stride() == tensor.stride()
                assert torch.equal(moved, tensor), name
        assert len(copies) == min(index + 2, len(items))
    with pytest.raises(StopIteration):
        next(stream)


def test_a_batch_of_one_block_is_copied_as_one():
    batch = in_one_block(numbered(7), private_block)
    buffers, [copied] = _copied([batch], CPU)
    [buffer] = buffers
    assert buffer.data_ptr() == copied.images.data_ptr()
    assert (copied.sample_ids == 7).all()


def test_a_block_is_not_filled_again_while_its_copy_is_under_way():
    outbox, inbox, copies = Outbox(), Inbox(), Copies()

    def arriving() -> Iterator[list[Batch]]:
        for number in range(1, 9):
            yield inbox.open(sent(outbox, number))

    stream = Prefetcher(arriving(), copies)
    first = next(stream)
    assert len(outbox._blocks) == 2
    copies[0].ended = True
    assert (next(stream)[0].labels.shape, len(outbox._blocks)) == ((2, 0), 2), "the first is free"
    next(stream)
    assert len(outbox._blocks) == 3, "two copies are under way"
    alive = [block.alive for block in outbox._blocks.values()]
    assert alive == [True, True, True]
    stream.close()
    assert [copy.waits for copy in copies] == [0, 1, 1, 1]
    assert not any(block.alive for block in outbox._blocks.values())
    assert (first[0].images == 1).all()


def test_an_error_is_raised_when_its_step_is_due_and_again():
    def failing() -> Iterator[list[Batch]]:
        yield [numbered(1)]
        yield [numbered(2)]
        raise OSError("shard 0001 is gone")

    stream = Prefetcher(failing(), Copies())
    assert [int(next(stream)[0].sample_ids[0]) for _ in range(2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="shard 0001"):
            next(stream)
    stream.close()


def test_a_block_is_registered_once_and_unregistered_when_the_worker_gives_it_up():
    calls: list[tuple[str, int]] = []

    def register(address: int, size: int):
        assert address % 4096 == 0
        assert size % CAPACITY_STEP == 0
        calls.append(("register", address))
        return lambda: calls.append(("unregister", address))

    outbox, inbox = Outbox(), Inbox(register)
    for number in (1, 2):
        inbox.open(sent(outbox, number))
    [(_, address)] = calls
    inbox.open(sent(outbox, 3, images=CAPACITY_STEP // 105 + 1))
    assert calls[1] == ("unregister", address), "a larger canvas took the block's place"
    assert [call for call, _ in calls] == ["register", "unregister", "register"]
    inbox.close()
    inbox.close()
    assert [call for call, _ in calls] == ["register", "unregister"] * 2


def test_memory_that_cannot_be_locked_is_told_once(capsys):
    locked: list[int] = []

    def refuse(address: int, size: int) -> int:
        locked.append(address)
        return 2

    register = PinnedBlocks(CPU, refuse, lambda address: 0)
    for address in (4096, 8192):
        register(address, 4096)()
    assert locked == [4096]
    assert capsys.readouterr().out.count("cannot page-lock") == 1
