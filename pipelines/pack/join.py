"""Several packed datasets to one: ids kept apart, categories matched by name, no image decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from contract.data import SCHEMA_VERSION
from contract.files import Files
from contract.machine.folders import own_name
from contract.words import shortened
from pipelines.coco.checks import read_category
from pipelines.coco.records import JsonObject
from pipelines.coco.remarks import Remark, Remarks
from pipelines.pack.scratch import scratch_folder
from pipelines.pack.shard import ShardNote, ShardPlace
from pipelines.pack.whole import (
    PROGRESS_FOLDER,
    Head,
    check_out,
    existing,
    finish,
    finished,
    known_problems,
    known_remarks,
    write_remarks,
)
from pipelines.progress import Progress, silent
from pipelines.shards import schema
from pipelines.shards.copies import copy_and_compare
from pipelines.shards.index import Index, Ints
from pipelines.shards.manifest import FileEntry, Manifest, read_manifest
from pipelines.shards.mapping import MappedFile, view

_INFO = "joined"  # the field of the manifest's `info` that says what was joined
_LARGEST = 2**63 - 1  # of an id


class Part(BaseModel):
    """How one dataset went into the joined one; kept in the manifest's `info`.

    manifest: its hash. image_shift, annotation_shift: what was added to its ids. category_ids: id
    there and id in the joined dataset, where they differ.
    """

    model_config = ConfigDict(frozen=True)

    manifest: str
    images: int
    image_shift: int
    annotation_shift: int
    category_ids: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        changes = [
            f"{what} ids + {shift:,}"
            for what, shift in (("image", self.image_shift), ("annotation", self.annotation_shift))
            if shift
        ]
        if self.category_ids:
            pairs = ", ".join(f"{old} is {new}" for old, new in self.category_ids)
            changes.append(f"category ids: {pairs}")
        return f"{self.images:,} images, {'; '.join(changes) or 'ids as they were'}"


@dataclass(frozen=True)
class Joined:
    """What `join` did. resumed_shards: taken over from an interrupted run."""

    manifest: Manifest
    parts: tuple[Part, ...]
    remarks: tuple[Remark, ...]
    unchanged: bool
    resumed_shards: int


@dataclass(frozen=True)
class _Source:
    """One of the datasets, and what becomes of its categories and ids.

    labels: dense label here -> dense label in the joined dataset.
    """

    store: Files
    manifest: Manifest
    index: Index
    category_ids: dict[int, int]  # id here -> id in the joined dataset
    labels: NDArray[np.int16]
    image_shift: int

    def prints(self) -> Iterator[tuple[int, int, int]]:
        """CRC-32, width and height of each image: two files that agree in all are one."""
        rows = np.arange(len(self.index))
        columns = (self.index.values(name, rows) for name in ("crc32", "width", "height"))
        return zip(*(column.tolist() for column in columns), strict=True)

    def moved(self, batch: pa.RecordBatch, shift: int) -> pa.RecordBatch:
        """A batch of a shard with its new ids; all else is as it was, to the byte."""
        lists = batch["annotations"]
        values = lists.values
        fields = {field.name: values.field(field.name) for field in schema.ANNOTATION}
        fields["id"] = pa.array(view(fields["id"]) + shift)
        old, place = np.unique(view(fields["category_id"]), return_inverse=True)
        new = np.array([self.category_ids[one] for one in old.tolist()], np.int64)
        fields["category_id"] = pa.array(new[place])
        struct = pa.StructArray.from_arrays(list(fields.values()), fields=list(schema.ANNOTATION))
        columns = {name: batch[name] for name in schema.SHARD.names}
        columns["image_id"] = pa.array(view(batch["image_id"]) + self.image_shift)
        columns["annotations"] = pa.LargeListArray.from_arrays(lists.offsets, struct)
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema.SHARD)

    def moved_index(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A shard's part of the index, with its new ids and labels."""
        columns = {name: batch[name] for name in schema.INDEX.names}
        columns["image_id"] = pa.array(view(batch["image_id"]) + self.image_shift)
        lists = batch["ann_label"]
        labels = pa.array(self.labels[view(lists.values)], pa.int16())
        columns["ann_label"] = pa.ListArray.from_arrays(lists.offsets, labels)
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema.INDEX)


def join(
    uris: Sequence[str],
    out_uri: str,
    *,
    union: bool = False,
    num_workers: int = 1,
    progress: Progress = silent,
) -> Joined:
    """Writes all images of several packed datasets into one, the first dataset's first.

    union: datasets may have other categories. An object of a category that only one of them labels
    trains as background in the images of the others. num_workers: threads that compare the hashes
    of a dataset which is there already. Calls `progress(shards done, in all)`.

    Raises ValueError for datasets that do not go together, RuntimeError for a damaged one.
    """
    stores, out = [Files(uri) for uri in uris], Files(out_uri)
    if len(stores) < 2:
        raise ValueError("join takes at least two datasets; name them one after another")
    manifests = [read_manifest(store) for store in stores]
    _check_different(stores, manifests, out)
    categories = _joined_categories(stores, manifests, union)
    inputs = [SCHEMA_VERSION, "join", *(manifest.hash for manifest in manifests)]
    source = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    there = existing(out, source, num_workers)
    if there is not None:
        out.delete(PROGRESS_FOLDER)  # a crash after the manifest may have left it
        parts = tuple(Part.model_validate(part) for part in there.info[_INFO])
        return Joined(there, parts, known_remarks(out), unchanged=True, resumed_shards=0)
    with scratch_folder(f"{own_name('join')}-") as folder:
        sources = _sources(stores, manifests, categories, folder)
        total = sum(manifest.num_shards for manifest in manifests)
        work = _Work(out, f"{PROGRESS_FOLDER}/{source[:16]}", progress, total)
        parts = tuple(work.write(one) for one in sources)
        remarks = _remarks(sources, categories, masks=any(note.masks for note in work.notes))
    info: JsonObject = {
        **manifests[0].info,
        _INFO: [part.model_dump(mode="json") for part in parts],
    }
    write_remarks(out, remarks)
    skipped = [problem for store in stores for problem in known_problems(store)]
    licences = tuple({json.dumps(one): one for m in manifests for one in m.licenses}.values())
    manifest = finish(out, work.notes, skipped, Head(categories, info, licences, source))
    return Joined(manifest, parts, remarks, unchanged=False, resumed_shards=work.resumed)


# --- what goes together ---------------------------------------------------------------------------


def _check_different(stores: Sequence[Files], manifests: Sequence[Manifest], out: Files) -> None:
    check_out(out)
    first: dict[str, str] = {}
    for store, manifest in zip(stores, manifests, strict=True):
        if store.path() == out.path():
            raise ValueError(f"{out.name}: is one of the datasets; give --out another folder")
        if manifest.hash in first:
            raise ValueError(
                f"{store.name}: is the same dataset as {first[manifest.hash]}; name it once"
            )
        first[manifest.hash] = store.name


def _joined_categories(
    stores: Sequence[Files], manifests: Sequence[Manifest], union: bool
) -> tuple[JsonObject, ...]:
    """The categories of all datasets: the first's, then what each of the others adds."""
    joined = _by_name(stores[0], manifests[0])
    for store, manifest in zip(stores[1:], manifests[1:], strict=True):
        own = _by_name(store, manifest)
        missing, added = joined.keys() - own.keys(), own.keys() - joined.keys()
        if (missing or added) and not union:
            parts = [
                f"{words} {shortened(', '.join(sorted(names)))}"
                for words, names in (("has no", missing), ("alone has", added))
                if names
            ]
            raise ValueError(
                f"{store.name}: {' and '.join(parts)}; what a dataset does not label would train "
                "as background in its images: label the same in all, or join them as they are "
                "with --union"
            )
        for name, one in own.items():
            if name in joined:
                joined[name] = _agreed(store, name, joined[name], one)
            else:
                taken = {read_category(other).id for other in joined.values()}
                wanted = (read_category(one).id, max(taken, default=0) + 1, *range(len(taken) + 1))
                free = next(id for id in wanted if id not in taken and id <= _LARGEST)
                joined[name] = {**one, "id": free}
    return tuple(joined.values())


def _by_name(store: Files, manifest: Manifest) -> dict[str, JsonObject]:
    named: dict[str, JsonObject] = {}
    for fields in manifest.categories:
        name = read_category(fields).name
        if name in named:
            raise ValueError(
                f"{store.name}: two categories are named {name!r}; give each a name of its own in "
                "the annotation file and pack again"
            )
        named[name] = fields
    return named


def _agreed(store: Files, name: str, before: JsonObject, one: JsonObject) -> JsonObject:
    """The record of a category that two datasets have: the first's, with what it does not say."""
    ours, theirs = read_category(before), read_category(one)
    for key, said, other in (
        # A dataset without keypoints says nothing of them; no pairs at all are something to say.
        ("keypoints", ours.keypoints or None, theirs.keypoints or None),
        ("flip_pairs", _pairs(ours.flip_pairs), _pairs(theirs.flip_pairs)),
    ):
        if said is not None and other is not None and said != other:
            raise ValueError(
                f"{store.name}: category {name!r} has other {key} than in the datasets before it; "
                "write the same in the annotation files and pack again"
            )
        if said is None and other is not None:
            before = {**before, key: one[key]}
    return {**one, **before}


def _pairs(pairs: tuple[tuple[str, str], ...] | None) -> set[frozenset[str]] | None:
    return None if pairs is None else {frozenset(pair) for pair in pairs}


def _sources(
    stores: Sequence[Files],
    manifests: Sequence[Manifest],
    categories: Sequence[JsonObject],
    folder: Path,
) -> list[_Source]:
    """The datasets with their indices, and with image ids that differ."""
    joined = [read_category(fields) for fields in categories]
    of_name = {category.name: label for label, category in enumerate(joined)}
    sources: list[_Source] = []
    taken: Ints = np.zeros(0, np.int64)
    for number, (store, manifest) in enumerate(zip(stores, manifests, strict=True)):
        index = Index(_copied(store, manifest.index, folder / f"index-{number}"))
        ids = index.values("image_id", np.arange(len(index)))
        shift = 0
        if np.isin(ids, taken).any():
            shift = _rounded_up(int(taken.max()) + 1 - int(ids.min()))
            _check_largest(store, "image", int(ids.max()) + shift)
        taken = np.concatenate([taken, ids + shift])
        own = manifest.coco_categories
        labels = np.array([of_name[category.name] for category in own], np.int16)
        new_ids = {category.id: joined[of_name[category.name]].id for category in own}
        sources.append(_Source(store, manifest, index, new_ids, labels, shift))
    return sources


def _rounded_up(number: int) -> int:
    """To one digit and zeros, so that a person can read the old id off the new one."""
    unit = int(10 ** (len(str(number)) - 1))
    return -(-number // unit) * unit


def _check_largest(store: Files, what: str, largest: int) -> None:
    if largest > _LARGEST:
        raise ValueError(
            f"{store.name}: its {what} ids would grow to {largest}, beyond 64 bits; give it "
            "smaller ids and pack again"
        )


def _remarks(
    sources: Sequence[_Source], categories: Sequence[JsonObject], masks: bool
) -> tuple[Remark, ...]:
    """What was remarked of the datasets, and what their being together makes odd."""
    remarks = Remarks()
    for source in sources:
        known = known_remarks(source.store)
        # That all are crowds need not be true of the whole; training says it if it is.
        remarks.join(remark for remark in known if remark.kind != "all_crowds")
        own = {category.name for category in source.manifest.coco_categories}
        missing = [name for c in categories if (name := read_category(c).name) not in own]
        if missing:
            where = f"{shortened(', '.join(missing))} in {source.store.name}"
            remarks.add("unlabelled", where, count=len(missing))
        if masks and not source.manifest.has_masks and source.manifest.num_annotations:
            where = f"all of {source.store.name}"
            remarks.add("no_mask", where, count=source.manifest.num_annotations)
    seen: set[tuple[int, int, int]] = set()
    for source in sources:
        prints = set(source.prints())
        for _, width, height in prints & seen:
            remarks.add("same_image", f"one of {width} x {height} px in {source.store.name}")
        seen |= prints
    meanings: dict[str, set[str]] = {}
    for source in sources:
        for one in source.manifest.licenses:
            number = json.dumps(one.get("id"))
            meanings.setdefault(number, set()).add(json.dumps(one, sort_keys=True))
    for number, texts in meanings.items():
        if len(texts) > 1 and number != "null":
            remarks.add("licence", f"id {number}")
    return remarks.all()


# --- shards ---------------------------------------------------------------------------------------


class _Work:
    """Writes the shards of one dataset after those of the other."""

    def __init__(self, out: Files, progress_folder: str, progress: Progress, total: int):
        self.out = out
        self.progress_folder = progress_folder
        self.progress = progress
        self.total = total
        self.notes: list[ShardNote] = []
        self.resumed = 0

    def write(self, source: _Source) -> Part:
        """All shards of one dataset."""
        last = max((note.last_annotation for note in self.notes), default=-1)
        shift = _rounded_up(last + 1) if last >= 0 else 0
        for number in range(source.manifest.num_shards):
            place = ShardPlace(len(self.notes), self.out, self.progress_folder)
            note = finished(place)
            self.resumed += note is not None
            self.notes.append(note or _write_shard(source, number, shift, place))
            self.progress(len(self.notes), self.total)
        return Part(
            manifest=source.manifest.hash,
            images=source.manifest.num_images,
            image_shift=source.image_shift,
            annotation_shift=shift,
            category_ids=tuple(
                (old, new) for old, new in source.category_ids.items() if old != new
            ),
        )


def _write_shard(source: _Source, number: int, shift: int, place: ShardPlace) -> ShardNote:
    """One shard with its new ids, then the note that it is finished."""
    last = -1
    with place.scratch() as folder:
        copy = _copied(source.store, source.manifest.shards[number], folder / "copy")
        part = folder / place.name
        with pa.ipc.new_file(str(part), schema.SHARD) as writer:
            for batch in MappedFile(copy).batches:
                annotations = batch["annotations"].values
                ids = view(annotations.field("id"))
                last = max(last, int(ids.max(initial=-1)) + shift)
                _check_largest(source.store, "annotation", last)
                writer.write_batch(source.moved(batch, shift))
        index = source.moved_index(source.index.batch(number))
        return place.keep(part, index, last_annotation=last)


def _copied(store: Files, entry: FileEntry, copy: Path) -> Path:
    """A sound copy of one file. Raises RuntimeError if the file is damaged."""
    error = copy_and_compare(store, entry, copy)
    if error is not None:
        raise RuntimeError(f"{store.describe(entry.name)}: {error}")
    return copy
