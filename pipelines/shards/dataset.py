"""A packed dataset: opened in a moment, picklable into any worker, narrowed by the run's filter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from contract.data import DataConfig, Filter
from contract.files import Files
from pipelines.progress import Progress, silent
from pipelines.shards.cache import Cache
from pipelines.shards.index import Index, Ints, Selection, select
from pipelines.shards.manifest import FileEntry, Manifest, read_manifest
from pipelines.shards.rows import Row, Shard, damaged_rows
from pipelines.shards.schema import annotation_record, image_record

MAX_OPEN_SHARDS = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Dataset:
    """A view of a packed dataset: all of it, or what `selection` leaves.

    Holds no open file when it is pickled. Rows are numbered through all shards.
    """

    store: Files
    manifest: Manifest
    selection: Selection
    cache: Cache
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.store, self.manifest.dump(), self.selection, self.cache)

    @cached_property
    def index(self) -> Index:
        return self._use(self.manifest.index, Index)

    @property
    def categories(self) -> tuple[dict[str, Any], ...]:
        """COCO category records of the view, in the order of their dense labels."""
        return tuple(self.manifest.categories[label] for label in self.selection.labels)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Dense label -> COCO category id, after the filter."""
        return tuple(int(category["id"]) for category in self.categories)

    def for_training(self, filter: Filter, masks: bool = False) -> Dataset:
        """The view that trains: filter, without the holdout."""
        return self._view(
            select(self.manifest.categories, filter, "train", training=True, masks=masks)
        )

    def for_evaluation(self, cfg: DataConfig) -> Dataset:
        """The view that is evaluated: every image, the filter's categories.

        Where `cfg.val` is `cfg.train` and there is a holdout, it is the held-out images that evaluate.
        """
        held_out = cfg.val == cfg.train and cfg.filter.holdout > 0
        part = "holdout" if held_out else "all"
        return self._view(select(self.manifest.categories, cfg.filter, part, training=False))

    def _view(self, selection: Selection) -> Dataset:
        return replace(self, selection=selection, _open=OrderedDict())

    def rows(self) -> list[int]:
        """All rows of the view, ascending."""
        return [
            int(r)
            for shard in range(self.index.num_shards)
            for r in self.index.selected(shard, self.selection)
        ]

    def image_ids(self) -> Ints:
        """Of the view's rows."""
        return self.index.values("image_id", np.array(self.rows(), np.int64))

    def row(self, number: int) -> Row:
        shard, local = self.index.locate(number)
        return self.shard(shard).row(local)

    def shard(self, number: int) -> Shard:
        """Opens a shard, or takes one of the open ones; the one used longest ago is closed for it."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        opened = self._use(self.manifest.shards[number], Shard)
        while len(self._open) >= MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = opened
        return opened

    def let_go(self) -> None:
        """Gives the memory-mapped pages that were read back to the page cache; everything stays usable."""
        self.index.let_go()
        for shard in self._open.values():
            shard.let_go()

    def coco(self) -> dict[str, Any]:
        """The view's images, annotations and categories as COCO JSON, in the order of packing."""
        kept = set(self.category_ids)
        images, annotations = [], []
        for shard in range(self.index.num_shards):
            rows = set(
                (self.index.selected(shard, self.selection) - self.index.starts[shard]).tolist()
            )
            for number, record in enumerate(
                self._use(self.manifest.shards[shard], Shard).records()
            ):
                if number not in rows:
                    continue
                images.append(image_record(record))
                annotations += [
                    annotation_record(a, record["image_id"])
                    for a in record["annotations"]
                    if a["category_id"] in kept
                ]
        return {
            "info": self.manifest.info,
            "licenses": list(self.manifest.licenses),
            "images": images,
            "annotations": annotations,
            "categories": list(self.categories),
        }

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """COCO annotations of one image of the view, for pictures; reads the index from the start."""
        for shard in range(self.index.num_shards):
            local = (self.index.column(shard, "image_id") == image_id).nonzero()[0]
            if len(local):
                kept = set(self.category_ids)
                record = self.shard(shard).record(int(local[0]))
                return [
                    annotation_record(a, image_id)
                    for a in record["annotations"]
                    if a["category_id"] in kept
                ]
        raise ValueError(f"{self.store.name}: no image {image_id}")

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (self.manifest.index, *self.manifest.shards)

    def fetch(self, entry: FileEntry) -> None:
        """Has a sound copy of one of its files in the node's cache. A dataset of this machine needs none."""
        if self.store.local is None:
            self.cache.drop_if_damaged(entry)
        self._use(entry, lambda _: None)

    def _use(self, entry: FileEntry, use: Callable[[Path], T]) -> T:
        """`use` of the local file of an entry."""
        folder = self.store.local
        if folder is None:
            return self.cache.fetch(
                self.store, entry, use, lambda copy: self._rows_of_damage(entry, copy)
            )
        path = folder / entry.name
        if not path.exists():
            raise RuntimeError(
                f'{path}: is missing; restore it or pack the data again with "maskray data pack"'
            )
        if path.stat().st_size != entry.bytes:
            raise RuntimeError(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {entry.bytes}; restore it or pack again"
            )
        return use(path)

    def _rows_of_damage(self, entry: FileEntry, copy: Path) -> str:
        """The rows of a shard that came damaged, in words."""
        if entry not in self.manifest.shards:
            return ""
        rows = damaged_rows(copy, self.index.column(self.manifest.shards.index(entry), "crc32"))
        return f" (row {', '.join(str(row) for row in rows)})" if rows else ""


@dataclass(frozen=True)
class Staged:
    """What `stage_datasets` did. cache: the folder, empty if no dataset is remote. evicted: files of other datasets."""

    done: int
    total: int
    bytes: int
    cache: str
    evicted: int


def stage_datasets(datasets: Sequence[Dataset], progress: Progress = silent) -> Staged:
    """Fills one cache with all of them. Raises ValueError if it cannot hold them together."""
    remote = {
        entry.sha256: entry.bytes for d in datasets if d.store.local is None for entry in d.files
    }
    size, total = sum(remote.values()), sum(len(dataset.files) for dataset in datasets)
    cache = datasets[0].cache
    if size > cache.cap_bytes:
        uris = ", ".join(dataset.store.describe("")[:-1] for dataset in datasets)
        raise ValueError(
            f"{uris}: {_size(size)} in all, the cache holds {_size(cache.cap_bytes)}; "
            "give it more with --cache-gib (and data.cache_gib in the run)"
        )
    done = 0
    for dataset in datasets:
        for entry in dataset.files:
            dataset.fetch(entry)
            done += 1
            progress(done, total)
    evicted = sum(dataset.cache.evicted for dataset in datasets)
    return Staged(total, total, size, str(cache.folder) if remote else "", evicted)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def open_dataset(uri: str, cache: str = "", cache_gib: float = 20) -> Dataset:
    """Reads the manifest of a folder or pyarrow.fs URI; everything else is opened when it is needed.

    cache: folder for copies of remote shards, empty for one in the system's temporary folder.
    """
    store = Files(uri)
    manifest = read_manifest(store)
    everything = Selection(tuple(range(len(manifest.categories))))
    return Dataset(store, manifest, everything, Cache(cache, cache_gib))


def _restore(store: Files, manifest: bytes, selection: Selection, cache: Cache) -> Dataset:
    return Dataset(store, Manifest.model_validate_json(manifest), selection, cache)
