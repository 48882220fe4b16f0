"""Which images make global batch number `step`: a pure function of (index, selection, seed, step).

Shards are permuted, and the images of `window` neighbours are shuffled together. Within fixed
blocks of whole global batches the images are sorted by aspect ratio, then the block's batches are
permuted. The epoch's first images fill up its last batch, so every epoch draws each image once and
at most `global_batch - 1` of them twice (more only if there are fewer images than a batch). Memory:
one number for each shard, one window, one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.shards.index import Index, Ints, Selection
from pipelines.shards.keyed_random import shuffled

# Purposes of noise. Other numbers would give every run another order.
_SHARDS, _WINDOW, _BLOCK = 1, 2, 3


@dataclass(frozen=True)
class Place:
    """Where a step stands: its epoch, and its number in that epoch."""

    epoch: int
    batch: int


class Order:
    """The sequence of global batches of one run."""

    def __init__(
        self,
        index: Index,
        selection: Selection,
        *,
        seed: int,
        global_batch: int,
        window_shards: int,
        block_batches: int,
    ):
        self._index, self._selection, self._seed = index, selection, seed
        self._batch, self._window, self._block = global_batch, window_shards, block_batches
        self._counts = index.counts(selection)
        self.num_images = int(self._counts.sum())
        if self.num_images == 0:
            census = index.census(selection)
            line = census.line(masks=False, keypoints=False)
            raise ValueError(
                f"no image of the training data has a usable object ({line}); {census.remedy}"
            )
        self.steps_per_epoch = -(-self.num_images // global_batch)
        # Neighbouring steps share epoch, windows and block. The caches are the object's own: one on
        # the class would keep every Order alive.
        self._epoch_shards = lru_cache(2)(self._epoch_shards)  # type: ignore[method-assign]
        self._window_rows = lru_cache(3)(self._window_rows)  # type: ignore[method-assign]
        self._block_rows = lru_cache(2)(self._block_rows)  # type: ignore[method-assign]

    def place(self, step: int) -> Place:
        """Steps are counted through all epochs."""
        return Place(*divmod(step, self.steps_per_epoch))

    def rows(self, step: int) -> Ints:
        """The rows of a global batch, neighbours in aspect ratio."""
        place = self.place(step)
        block, number = divmod(place.batch, self._block)
        return np.asarray(self._block_rows(place.epoch, block)[number])

    def sequence(self, epoch: int, first: int, last: int) -> Ints:
        """Rows at positions first <= p < last of the epoch's order, before the sort by aspect.

        Positions past the last image begin again at the first.
        """
        if last > self.num_images:
            if first >= self.num_images:
                return self.sequence(epoch, first - self.num_images, last - self.num_images)
            wrapped = self.sequence(epoch, 0, last - self.num_images)
            return np.concatenate([self.sequence(epoch, first, self.num_images), wrapped])
        _, ends = self._epoch_shards(epoch)
        window_ends = ends[self._window - 1 :: self._window]
        window = int(np.searchsorted(window_ends, first, side="right"))
        pieces: list[Ints] = []  # a block may begin in one window and end in another
        while first < last:
            rows = self._window_rows(epoch, window)
            start = int(window_ends[window - 1]) if window else 0
            pieces.append(rows[first - start : last - start])
            first += len(pieces[-1])
            window += 1
        return np.concatenate(pieces)

    def _epoch_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's permutation of shards, and the number of images up to the end of each."""
        shards = shuffled(self._index.num_shards, self._seed, epoch, _SHARDS)
        return shards, np.cumsum(self._counts[shards])

    def _window_rows(self, epoch: int, window: int) -> Ints:
        shards, _ = self._epoch_shards(epoch)
        chosen = shards[window * self._window : (window + 1) * self._window]
        rows = np.concatenate(
            [self._index.selected(int(shard), self._selection) for shard in chosen]
        )
        return np.asarray(rows[shuffled(len(rows), self._seed, epoch, _WINDOW, window)])

    def _block_rows(self, epoch: int, block: int) -> Ints:
        """The batches (number, global_batch) of one block."""
        first = block * self._block
        count = min(self._block, self.steps_per_epoch - first)
        rows = self.sequence(epoch, first * self._batch, (first + count) * self._batch)
        # Neighbours in aspect ratio fill their canvas. "stable": equal ratios are common, and their
        # order must not depend on NumPy's version.
        aspect = self._index.values("width", rows) / self._index.values("height", rows)
        batches = rows[np.argsort(aspect, kind="stable")].reshape(count, self._batch)
        return np.asarray(batches[shuffled(count, self._seed, epoch, _BLOCK, block)])


def rank_slice(global_batch: int, rank: int, world_size: int) -> slice:
    """A rank's part of a global batch: contiguous, and the parts differ by one image at most."""
    return slice(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)


def chunks(count: int, largest: int) -> list[slice]:
    """Cuts range(count) into the fewest pieces of at most `largest`; they differ by one at most."""
    pieces = -(-count // largest)
    return [slice(k * count // pieces, (k + 1) * count // pieces) for k in range(pieces)]
