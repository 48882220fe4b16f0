"""A packed dataset: opened in a moment, picklable into any worker, narrowed by the run's filter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from contract.data import DataConfig, Filter
from contract.files import Files
from pipelines.coco.collector import collector_paused
from pipelines.coco.records import CocoAnnotation, CocoCategory, JsonObject, LabelledImage
from pipelines.progress import Progress, silent
from pipelines.shards.cache import Cache
from pipelines.shards.index import Index, Ints, Selection, select
from pipelines.shards.manifest import FileEntry, Manifest, read_manifest
from pipelines.shards.rows import Row, Shard, damaged_rows

MAX_OPEN_SHARDS = 64  # a map and a file descriptor each, in each process

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
    oks_sigmas: tuple[float, ...] = ()  # of an evaluation view, as `data.oks_sigmas`
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker opens its own files: maps and record batches cannot be pickled.
        own = (self.selection, self.cache, self.oks_sigmas)
        return _restore, (self.store, self.manifest.dump(), *own)

    @cached_property
    def index(self) -> Index:
        """What order and filter know of every image."""
        return self._use(self.manifest.index, Index)

    @cached_property
    def categories(self) -> tuple[CocoCategory, ...]:
        """The categories of the view, in the order of their dense labels."""
        categories = self.manifest.coco_categories
        return tuple(categories[label] for label in self.selection.labels)

    @cached_property
    def category_ids(self) -> tuple[int, ...]:
        """Dense label -> COCO category id, after the filter."""
        return tuple(category.id for category in self.categories)

    def for_training(self, filter: Filter) -> Dataset:
        """The view that trains: filter, without the holdout."""
        return self._view(select(self.manifest.coco_categories, filter, "train", training=True))

    def for_evaluation(self, cfg: DataConfig) -> Dataset:
        """The view that is evaluated: every image, the filter's categories.

        With a holdout and `cfg.val` equal to `cfg.train`, the held-out images evaluate.
        """
        held_out = cfg.val == cfg.train and cfg.filter.holdout > 0
        part = "holdout" if held_out else "all"
        selection = select(self.manifest.coco_categories, cfg.filter, part, training=False)
        kept = set(selection.labels)
        # The order of this view's labels, which is the order of the model's classes.
        labels = tuple(label for label in self.selection.labels if label in kept)
        view = self._view(replace(selection, labels=labels))
        return replace(view, oks_sigmas=cfg.oks_sigmas)

    def aligned_with(self, other: Dataset) -> Dataset:
        """The same data with its dense labels in the order of the other's category names.

        The names must be the same; ids and their order are each file's own affair.
        """
        names = [category.name for category in self.manifest.coco_categories]
        wanted = [category.name for category in other.manifest.coco_categories]
        if names == wanted:
            return self
        labels = tuple(names.index(name) for name in wanted)
        return self._view(replace(self.selection, labels=labels))

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
        """One image with its annotations, as views into its shard."""
        shard, local = self.index.locate(number)
        return self.shard(shard).row(local)

    def shard(self, number: int) -> Shard:
        """An open shard. The one that was used longest ago is closed if there are too many."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        opened = self._use(self.manifest.shards[number], Shard)
        while len(self._open) >= MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = opened
        return opened

    def let_go(self) -> None:
        """Gives the memory-mapped pages that were read back to the page cache. All stays usable."""
        self.index.let_go()
        for shard in self._open.values():
            shard.let_go()

    @collector_paused()
    def coco(self) -> dict[str, Any]:
        """The view's images, annotations and categories as COCO JSON, in the order of packing."""
        images: list[JsonObject] = []
        annotations: list[JsonObject] = []
        for labelled in self._labelled_images():
            images.append(labelled.image.json())
            annotations += [annotation.json() for annotation in self._kept(labelled)]
        # The manifest keeps all that the files say of a category; the records know a part of it.
        categories = [self.manifest.categories[label] for label in self.selection.labels]
        return {
            "info": self.manifest.info,
            "licenses": list(self.manifest.licenses),
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }

    def annotations(self, image_id: int) -> list[CocoAnnotation]:
        """The view's annotations of one image, for pictures; searches the index from its start."""
        for shard in range(self.index.num_shards):
            places = (self.index.column(shard, "image_id") == image_id).nonzero()[0]
            if len(places):
                return self._kept(self.shard(shard).labelled_image(int(places[0])))
        raise ValueError(f"{self.store.name}: no image {image_id}")

    def _labelled_images(self) -> Iterator[LabelledImage]:
        """The view's images, with the annotations of all categories."""
        for number in range(self.index.num_shards):
            rows = self.index.selected(number, self.selection) - self.index.starts[number]
            chosen = set(rows.tolist())
            # Not from the open shards: an export reads each shard once, and need not hold it.
            shard = self._use(self.manifest.shards[number], Shard)
            yield from (
                labelled for row, labelled in enumerate(shard.labelled_images()) if row in chosen
            )

    def _kept(self, labelled: LabelledImage) -> list[CocoAnnotation]:
        """The annotations of the view's categories."""
        kept = set(self.category_ids)
        return [annotation for annotation in labelled.annotations if annotation.category_id in kept]

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Everything but the manifest."""
        return (self.manifest.index, *self.manifest.shards)

    def fetch(self, entry: FileEntry) -> None:
        """Puts a sound copy of one of its files into the node's cache.

        A dataset on this machine needs no copy.
        """
        if self.store.local is None:
            self.cache.drop_if_damaged(entry)
        self._use(entry, lambda _: None)

    def _use(self, entry: FileEntry, use: Callable[[Path], T]) -> T:
        """`use` of the local file of an entry, which a remote dataset has in its cache."""
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
        # The size is free to check; hashes are for `data verify`.
        if path.stat().st_size != entry.bytes:
            raise RuntimeError(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {entry.bytes}; "
                "restore it or pack again"
            )
        return use(path)

    def _rows_of_damage(self, entry: FileEntry, copy: Path) -> str:
        """The rows of a shard that arrived damaged, in words for a message."""
        if entry not in self.manifest.shards:
            return ""
        rows = damaged_rows(copy, self.index.column(self.manifest.shards.index(entry), "crc32"))
        return f" (row {', '.join(str(row) for row in rows)})" if rows else ""


@dataclass(frozen=True)
class Staged:
    """What `stage_datasets` did: done, total and evicted count files.

    cache: the folder, empty if no dataset is remote. evicted: files of other datasets.
    """

    done: int
    total: int
    bytes: int
    cache: str
    evicted: int


def stage_datasets(datasets: Sequence[Dataset], progress: Progress = silent) -> Staged:
    """Fills one cache with all of them. Raises ValueError if it cannot hold them together."""
    # By hash: two datasets may share a file.
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
    """Reads the manifest of a folder or pyarrow.fs URI. All else is opened when it is needed.

    cache: folder for copies of remote shards, empty for one in the system's temporary folder.
    """
    store = Files(uri)
    manifest = read_manifest(store)
    everything = Selection(tuple(range(len(manifest.categories))))
    return Dataset(store, manifest, everything, Cache(cache, cache_gib))


def _restore(
    store: Files,
    manifest: bytes,
    selection: Selection,
    cache: Cache,
    oks_sigmas: tuple[float, ...],
) -> Dataset:
    return Dataset(store, Manifest.model_validate_json(manifest), selection, cache, oks_sigmas)
