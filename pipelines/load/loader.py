"""Streams of padded batches for training and evaluation, the same at any world size and number of workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from contract.data import DataConfig
from contract.model import ImageInput
from model.structures import Batch
from pipelines.load.blocks import Allocate, Inbox, Outbox, Parcel, private_block
from pipelines.load.collate import Padding, collate, padded_count, round_up
from pipelines.load.images import resize, resize_without_antialias, resized_size, torchvision_size
from pipelines.load.order import Order, chunks, rank_slice
from pipelines.load.proposals import ProposalTable
from pipelines.load.sample import (
    Sample,
    Wanted,
    draw,
    flip_boxes,
    mirrored_keypoints,
    read_image,
    short_sides,
    training_sample,
)
from pipelines.shards.dataset import Dataset
from pipelines.shards.index import Ints
from pipelines.shards.keyed_random import noise_keys

PREFETCHED_PER_WORKER = 2
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class TrainStep:
    """One rank's part of a global batch, in chunks of one canvas."""

    step: int
    epoch: int
    batches: list[Batch]


@dataclass(frozen=True)
class _TrainSource:
    """Step number -> TrainStep, as a pure function; pickled into workers, opens its files there."""

    cfg: DataConfig
    dataset: Dataset
    seed: int
    global_batch: int
    rank: int
    world_size: int
    max_images: int
    wanted: Wanted
    proposals: ProposalTable | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_caches(self)

    @cached_property
    def order(self) -> Order:
        return Order(
            self.dataset.index,
            self.dataset.selection,
            seed=self.seed,
            global_batch=self.global_batch,
            window_shards=self.cfg.shuffle_window_shards,
            block_batches=self.cfg.bucket_batches,
        )

    def finish(self, step: int, batches: list[Batch]) -> TrainStep:
        return TrainStep(step, self.order.place(step).epoch, batches)

    def load(self, step: int, allocate: Allocate) -> list[Batch]:
        epoch, rows = self.order.place(step).epoch, self.order.rows(step)
        ids = self.dataset.index.values("image_id", rows)
        keys = noise_keys(self.seed, epoch, ids)
        padding = self._padding(rows, keys)
        mine = rank_slice(self.global_batch, self.rank, self.world_size)
        rows, keys = rows[mine], keys[mine]
        batches = []
        for chunk in chunks(len(rows), self.max_images):
            samples = [
                training_sample(self.cfg, self.dataset, int(row), drawn, self.wanted)
                for row, drawn in zip(rows[chunk], draw(self.cfg, keys[chunk]), strict=True)
            ]
            found = (
                [canvas_proposals(self.proposals, sample) for sample in samples]
                if self.proposals
                else []
            )
            batches.append(collate(samples, padding, found, allocate))
        self.dataset.let_go()
        return batches

    def _padding(self, rows: Ints, keys: Ints) -> Padding:
        """The canvas of the global batch, from the index alone."""
        index, cfg = self.dataset.index, self.cfg
        heights, widths = index.values("height", rows), index.values("width", rows)
        sizes = np.array(
            [
                resized_size(int(h), int(w), int(s), cfg.max_side_px)
                for h, w, s in zip(heights, widths, short_sides(cfg, keys), strict=True)
            ]
        )
        return Padding(
            height=round_up(int(sizes[:, 0].max()), cfg.canvas_multiple_px),
            width=round_up(int(sizes[:, 1].max()), cfg.canvas_multiple_px),
            objects=padded_count(int(index.object_counts(rows, self.dataset.selection).max())),
            mask_side=cfg.mask_crop_side if self.wanted.masks else 0,
            num_keypoints=self.wanted.num_keypoints,
            num_proposals=self.proposals.most if self.proposals else 0,
        )


class TrainLoader:
    """Iterating yields `TrainStep`s without end, from `start_step` on.

    Step s is a pure function of (manifest, cfg, seed, global_batch, s): a rank gets its contiguous slice of that
    global batch. A data state is therefore a step number and the manifest's hash, and resuming is `start_step`.
    """

    def __init__(
        self,
        cfg: DataConfig,
        dataset: Dataset,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        max_images_per_forward: int,
        start_step: int = 0,
        masks: bool,
        num_keypoints: int = 0,
        proposals_uri: str = "",
    ):
        if global_batch < world_size:
            raise ValueError(
                f"loop.global_batch is {global_batch} for {world_size} ranks; each needs at least 1 image"
            )
        if masks and not dataset.manifest.has_masks:
            raise ValueError(
                f"{dataset.store.name}: has no masks, the model trains some; set model.mask.kind to 'none'"
            )
        self.dataset = dataset.for_training(cfg.filter, masks)
        self._start_step = start_step
        self._source = _TrainSource(
            cfg,
            self.dataset,
            seed,
            global_batch,
            rank,
            world_size,
            max_images_per_forward,
            Wanted(
                masks, num_keypoints, mirrored_keypoints(self.dataset.categories, num_keypoints)
            ),
            ProposalTable(proposals_uri) if proposals_uri else None,
        )
        self._stream: _Stream[TrainStep] = _Stream(self._source, cfg.num_loader_workers)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches until every image was drawn once."""
        return self._source.order.steps_per_epoch

    def sample_ids(self, step: int) -> list[int]:
        """Image ids of the whole global batch of any step, without loading it."""
        order = self._source.order
        return [int(i) for i in self.dataset.index.values("image_id", order.rows(step))]

    def __iter__(self) -> Iterator[TrainStep]:
        return self._stream.iterate(itertools.count(self._start_step))

    def close(self) -> None:
        """Ends the workers."""
        self._stream.close()


@dataclass(frozen=True)
class _EvalSource:
    cfg: DataConfig
    dataset: Dataset
    image: ImageInput
    batch_size: int
    proposals: ProposalTable | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_caches(self)

    @cached_property
    def order(self) -> Ints:
        """All rows of the view, sorted by aspect ratio so that canvases are tight; the same on every rank."""
        rows = np.array(self.dataset.rows(), np.int64)
        index = self.dataset.index
        aspect = index.values("width", rows) / index.values("height", rows)
        return np.asarray(rows[np.argsort(aspect, kind="stable")])

    def finish(self, _: int, batches: list[Batch]) -> Batch:
        return batches[0]

    def load(self, number: int, allocate: Allocate) -> list[Batch]:
        rows = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        samples = [self._sample(int(row)) for row in rows]
        found = (
            [canvas_proposals(self.proposals, sample) for sample in samples]
            if self.proposals
            else []
        )
        multiple = self.image.canvas_multiple_px
        padding = Padding(
            height=round_up(max(sample.image.shape[1] for sample in samples), multiple),
            width=round_up(max(sample.image.shape[2] for sample in samples), multiple),
            objects=0,
            mask_side=0,
            num_keypoints=0,
            num_proposals=self.proposals.most if self.proposals else 0,
        )
        batch = collate(samples, padding, found, allocate)
        self.dataset.let_go()
        return [batch]

    def _sample(self, row_number: int) -> Sample:
        row = self.dataset.row(row_number)
        image, short, longest = (
            read_image(row, self.dataset),
            self.image.short_side_px,
            self.image.max_side_px,
        )
        match self.image.resize:
            case "antialias":
                image = resize(image, *resized_size(row.height, row.width, short, longest))
            case "torchvision-detection":
                image = resize_without_antialias(
                    image, *torchvision_size(row.height, row.width, short, longest)
                )
        return Sample(
            image=image,
            original_size=(row.height, row.width),
            image_id=row.image_id,
            noise_key=int(noise_keys(0, 0, np.array([row.image_id]))[0]),
            flipped=False,
            boxes_xyxy=np.zeros((0, 4)),
            labels=np.zeros(0, np.int64),
            masks=np.zeros((0, 0, 0), np.uint8),
            keypoints=np.zeros((0, 0, 3)),
        )


class EvalLoader:
    """Each image of the validation data once, also those without annotations; no padding images.

    The list of batches does not depend on the world size: rank r takes batches r, r + W, ... Ground truth stays in
    `.dataset`, which `evaluate` reads.
    """

    def __init__(
        self,
        cfg: DataConfig,
        dataset: Dataset,
        image: ImageInput,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        proposals_uri: str = "",
    ):
        self.dataset = dataset.for_evaluation(cfg)
        table = ProposalTable(proposals_uri) if proposals_uri else None
        self._source = _EvalSource(cfg, self.dataset, image, batch_size, table)
        self.num_batches = -(-len(self._source.order) // batch_size)  # over all ranks
        self._mine = range(rank, self.num_batches, world_size)
        self._stream: _Stream[Batch] = _Stream(
            self._source, min(cfg.num_loader_workers, len(self._mine))
        )

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._mine)

    def __iter__(self) -> Iterator[Batch]:
        return self._stream.iterate(self._mine)

    def close(self) -> None:
        self._stream.close()


def canvas_proposals(table: ProposalTable, sample: Sample) -> np.ndarray:
    """The sample's proposals (Q, 4) scaled and flipped with its image."""
    boxes, _ = table.get(sample.image_id)
    (height, width), (_, new_height, new_width) = sample.original_size, sample.image.shape
    scaled = boxes.astype(np.float64) * np.tile([new_width / width, new_height / height], 2)
    return flip_boxes(scaled, new_width) if sample.flipped else scaled


# --- workers --------------------------------------------------------------------------------------------------------


class _Source(Protocol[T_co]):
    """Number -> item in two parts: the batches, computed anywhere, and what the consumer makes of them."""

    def load(self, number: int, allocate: Allocate, /) -> list[Batch]: ...

    def finish(self, number: int, batches: list[Batch], /) -> T_co: ...


class _Stream(Generic[T]):
    """The items of given numbers in their order, computed here or ahead of time in worker processes."""

    def __init__(self, source: _Source[T], num_workers: int):
        self._source, self._num_workers = source, num_workers
        self._running: list[Any] = []

    def iterate(self, numbers: Iterable[int]) -> Iterator[T]:
        source = self._source
        if self._num_workers == 0:
            return (source.finish(number, source.load(number, private_block)) for number in numbers)
        iterator = iter(_worker_loader(source, numbers, self._num_workers))
        self._running.append(iterator)
        return self._opened(iterator)

    def _opened(self, answers: Iterator[Any]) -> Iterator[T]:
        inbox = Inbox()
        for number, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            yield self._source.finish(number, inbox.open(answer))

    def close(self) -> None:
        for iterator in self._running:
            iterator._shutdown_workers()
        self._running.clear()


def _without_caches(record: Any) -> tuple[Any, ...]:
    """How a source is pickled: its fields, not what it has opened."""
    return type(record), tuple(getattr(record, f.name) for f in fields(record))


class _Numbered(TorchDataset[Any]):
    """Number -> (number, parcel), or the error, which is raised as it is by the process that asked."""

    def __init__(self, source: _Source[Any]):
        self._source = source

    @cached_property
    def _outbox(self) -> Outbox:
        return Outbox()

    def __getitem__(self, number: int) -> tuple[int, Parcel | Exception]:
        try:
            return number, self._outbox.parcel(self._source.load(number, self._outbox.allocate))
        except (ValueError, RuntimeError, OSError) as error:
            return number, error


class _Numbers:
    """A sampler of the given numbers, endless or not."""

    def __init__(self, numbers: Iterable[int]):
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def _worker_loader(
    source: _Source[Any], numbers: Iterable[int], num_workers: int
) -> DataLoader[Any]:
    """Workers come from a fork server that has only imported this module: safe beside threads, S3 and CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        _Numbered(source),
        batch_size=None,
        sampler=_Numbers(numbers),
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_PER_WORKER,
        multiprocessing_context=context,
        worker_init_fn=partial(_start_worker, dict(os.environ)),
    )


def _start_worker(environment: dict[str, str], _: int) -> None:
    """The fork server has the environment of the day it started; a worker needs its parent's (S3 credentials)."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """torch's own watchdog looks at the fork server, which outlives a killed trainer as long as its workers do."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__: Sequence[str] = ("EvalLoader", "TrainLoader", "TrainStep")
