"""What order and filter know of every image: memory-mapped, one record batch for each shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from contract.data import Filter
from pipelines.coco.records import CocoCategory
from pipelines.shards import schema
from pipelines.shards.keyed_random import chain
from pipelines.shards.mapping import MappedFile, view

Ints = NDArray[np.int64]
_HOLDOUT_SALT = 0x686F6C64  # "hold" in ASCII; another value would draw another holdout


@dataclass(frozen=True)
class Selection:
    """Which annotations train and which images are drawn: a run's filter and its heads' needs.

    labels: dense labels (positions in the manifest's categories) that are kept; their position here
    is the new label. require_keypoints: only images with a usable object with a labelled keypoint
    are drawn, and all their objects train. part: "train" leaves the holdout out, "holdout" is the
    holdout alone, "all" is both. drop_empty: images without a usable object are left out.
    """

    labels: tuple[int, ...]
    require_keypoints: bool = False
    min_area_px: float = 0.0
    holdout: float = 0.0
    part: str = "all"
    drop_empty: bool = False

    def usable(
        self, label: NDArray[np.int16], area: NDArray[np.float64], flags: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Which annotations train: on the image, not a crowd, of a kept category, large enough."""
        # An object without mask or keypoints trains its box: left out, its place would train as
        # background.
        kept = (flags & (schema.HAS_BOX | schema.CROWD)) == schema.HAS_BOX
        # A table by label costs one look-up an annotation, whatever the number of kept labels.
        chosen = np.zeros(max(int(label.max(initial=0)), *self.labels, 0) + 1, np.bool_)
        chosen[list(self.labels)] = True
        return np.asarray(kept & (area >= self.min_area_px) & chosen[label])

    def drawn(self, image_ids: Ints) -> NDArray[np.bool_]:
        """Which images belong to the part.

        A hash of its id decides it for each image, whatever else is in the dataset.
        """
        if self.part == "all" or self.holdout == 0:
            return np.full(len(image_ids), self.part != "holdout")
        # The upper 53 bits of the hash make a number in [0, 1).
        bits = chain(_HOLDOUT_SALT, image_ids.view(np.uint64)) >> np.uint64(11)
        held = bits * 2.0**-53 < self.holdout
        return np.asarray(held if self.part == "holdout" else ~held)


def select(
    categories: Sequence[CocoCategory],
    chosen: Filter,
    part: str,
    training: bool,
) -> Selection:
    """The selection that `chosen` makes of these categories.

    Evaluation is narrowed by categories and images alone. Raises ValueError for a name that is not
    among the categories.
    """
    names = [category.name for category in categories]
    for name in chosen.categories:
        if name not in names:
            raise ValueError(
                f"data.filter.categories: no category {name!r} in the dataset; there are "
                f"{', '.join(names)}"
            )
    labels = tuple(
        k for k, name in enumerate(names) if not chosen.categories or name in chosen.categories
    )
    if not training:
        return Selection(labels, holdout=chosen.holdout, part=part)
    return Selection(
        labels,
        require_keypoints=chosen.require_keypoints,
        min_area_px=chosen.min_area_px,
        holdout=chosen.holdout,
        part=part,
        drop_empty=chosen.drop_empty,
    )


@dataclass(frozen=True)
class Census:
    """Objects of a part of the dataset, by what becomes of them.

    too_small: below `data.filter.min_area_px`. beside_keypoints: of images that
    `data.filter.require_keypoints` leaves out. without_mask, without_keypoints: of those that
    train, the ones that train less than the others. The first four besides `training` add up with
    it to `objects`.
    """

    objects: int = 0
    training: int = 0
    crowds: int = 0
    without_box: int = 0
    too_small: int = 0
    beside_keypoints: int = 0
    without_mask: int = 0
    without_keypoints: int = 0

    def __add__(self, other: Census) -> Census:
        return Census(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def line(self, masks: bool, keypoints: bool) -> str:
        """ "9,412 of 9,690 objects train: 201 crowds, 77 without mask: boxes only" """
        out = [
            (self.crowds, "crowds"),
            (self.without_box, "without a box"),
            (self.too_small, "below min_area_px"),
            (self.beside_keypoints, "in images without keypoints"),
        ]
        less = [
            (self.without_mask * masks, "without mask: boxes only"),
            (self.without_keypoints * keypoints, "without keypoints"),
        ]
        parts = [f"{count:,} {what}" for count, what in [*out, *less] if count]
        why = f": {', '.join(parts)}" if parts else ""
        return f"{self.training:,} of {self.objects:,} objects train{why}"

    @property
    def remedy(self) -> str:
        """What to do where nothing trains."""
        if self.objects == 0:
            return "pack annotations of these categories, or widen data.filter"
        if self.objects == self.crowds:
            return (
                "iscrowd 1 marks a region to ignore; where each is one object, write 0 "
                """(sed -i 's/"iscrowd": *1/"iscrowd": 0/g' FILE) and pack again"""
            )
        if self.too_small or self.beside_keypoints:
            return "widen data.filter"
        return "give the objects boxes with a width and a height, and pack again"


class Index:
    """The index file of a dataset. Rows are numbered through all shards."""

    def __init__(self, path: Path):
        self._file = MappedFile(path)
        self._shards = self._file.batches
        self.starts: Ints = np.cumsum(
            [0] + [batch.num_rows for batch in self._shards], dtype=np.int64
        )
        # The cache is the object's own: one on the class would keep every index alive.
        self._usable = lru_cache(64)(self._usable)  # type: ignore[method-assign]

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def let_go(self) -> None:
        """Gives the pages of what was read back to the page cache."""
        self._file.let_go()

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, row within it)."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])

    def batch(self, shard: int) -> pa.RecordBatch:
        """A shard's part of the index, of `schema.INDEX`."""
        return self._shards[shard]

    def column(self, shard: int, name: str) -> NDArray[Any]:
        """image_id, width, height or crc32 of a shard's rows, as a view."""
        return view(self._shards[shard][name])

    def annotation_columns(self, shard: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Dense labels and flags of all annotations of a shard."""
        return _flat(self._shards[shard], "ann_label"), _flat(self._shards[shard], "ann_flags")

    def census(self, selection: Selection) -> Census:
        """What becomes of the objects of the selection's categories and part."""
        counts = Census()
        chosen = np.array(selection.labels)
        for number, batch in enumerate(self._shards):
            offsets = view(batch["ann_label"].offsets)
            rows = self.selected(number, selection) - self.starts[number]
            drawn = np.zeros(batch.num_rows, np.bool_)
            drawn[rows] = True
            part = selection.drawn(view(batch["image_id"]))
            per_image = np.diff(offsets)
            here, trained = np.repeat(part, per_image), np.repeat(drawn, per_image)
            label, area, flags = (_flat(batch, name) for name in _PER_ANNOTATION)
            here &= np.isin(label, chosen)
            crowd = (flags & schema.CROWD) != 0
            boxed = (flags & schema.HAS_BOX) != 0
            fit = _usable_of(batch, selection) & here
            usable = fit & trained
            counts += Census(
                objects=int(here.sum()),
                training=int(usable.sum()),
                crowds=int((here & crowd).sum()),
                without_box=int((here & ~crowd & ~boxed).sum()),
                too_small=int((here & ~crowd & boxed & (area < selection.min_area_px)).sum()),
                beside_keypoints=int((fit & ~trained).sum()),
                without_mask=int((usable & ((flags & schema.HAS_MASK) == 0)).sum()),
                without_keypoints=int((usable & ((flags & schema.HAS_KEYPOINTS) == 0)).sum()),
            )
        return counts

    def usable_objects(self, row: int, selection: Selection) -> tuple[Ints, Ints]:
        """The annotations of a row that train.

        Returns their positions among the row's annotations, and their labels in the manifest.
        """
        shard, local = self.locate(row)
        lists = self._shards[shard]["ann_label"]
        first, last = view(lists.offsets)[local : local + 2].tolist()
        before = self._usable(shard, selection)[first : last + 1]
        positions = np.flatnonzero(before[1:] > before[:-1])
        return positions, _flat(self._shards[shard], "ann_label")[first + positions].astype(
            np.int64
        )

    def values(self, name: str, rows: Ints) -> NDArray[np.int64]:
        """A column at any rows."""
        values = np.empty(len(rows), np.int64)
        for shard, places in self._by_shard(rows):
            values[places] = self.column(shard, name)[rows[places] - self.starts[shard]]
        return values

    def object_counts(self, rows: Ints, selection: Selection) -> Ints:
        """How many usable objects each row has."""
        counts = np.empty(len(rows), np.int64)
        for shard, places in self._by_shard(rows):
            before, local = self._usable(shard, selection), rows[places] - self.starts[shard]
            offsets = view(self._shards[shard]["ann_label"].offsets)
            counts[places] = before[offsets[local + 1]] - before[offsets[local]]
        return counts

    def selected(self, shard: int, selection: Selection) -> Ints:
        """The rows of a shard (numbered through all shards) that the selection draws, ascending."""
        batch = self._shards[shard]
        drawn = selection.drawn(view(batch["image_id"]))
        # Training only: evaluation sees every image.
        wanted = [_usable_of(batch, selection)] if selection.drop_empty else []
        if selection.require_keypoints:
            labelled = (_flat(batch, "ann_flags") & schema.HAS_KEYPOINTS) != 0
            wanted.append(_usable_of(batch, selection) & labelled)
        offsets = view(batch["ann_label"].offsets)
        for kept in wanted:  # each image needs one
            before = _counted(kept)
            drawn = drawn & (before[offsets[1:]] > before[offsets[:-1]])
        return np.asarray(np.flatnonzero(drawn) + self.starts[shard])

    def counts(self, selection: Selection) -> Ints:
        """How many rows of each shard are drawn."""
        return np.array(
            [len(self.selected(shard, selection)) for shard in range(self.num_shards)], np.int64
        )

    def _usable(self, shard: int, selection: Selection) -> Ints:
        """How many of a shard's first n annotations train, for each n from 0.

        A row's count is then one difference. It takes 8 bytes an annotation.
        """
        return _counted(_usable_of(self._shards[shard], selection))

    def _by_shard(self, rows: Ints) -> list[tuple[int, Ints]]:
        # Rows of a batch come from few shards; one look-up a shard serves all its rows.
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]


_PER_ANNOTATION = ("ann_label", "ann_area", "ann_flags")


def _usable_of(batch: pa.RecordBatch, selection: Selection) -> NDArray[np.bool_]:
    return selection.usable(*(_flat(batch, name) for name in _PER_ANNOTATION))


def _counted(kept: NDArray[np.bool_]) -> Ints:
    """How many of the first n are kept, for each n from 0."""
    return np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])


def _flat(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    return view(batch[name].values)
