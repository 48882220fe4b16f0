"""Streams of padded batches for training and evaluation.

They are the same at any world size and number of workers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from contract.data import DataConfig
from contract.machine.folders import end_with_starter, fork_server
from contract.model import ImageInput
from model.structures import Batch
from pipelines.load.blocks import (
    Allocate,
    Inbox,
    Outbox,
    Parcel,
    Register,
    private_block,
    unregistered,
)
from pipelines.load.canvases import Canvas, chosen_canvases, smallest_holding
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
from pipelines.shards.rows import Floats

PREFETCHED_PER_WORKER = 2  # batches; torch's own default
# The first steps of a run, from whose batches the canvases are chosen.
_STEPS_FOR_CANVASES = 512
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
    """Step number -> TrainStep, a pure function. A pickled source opens its files in the worker."""

    cfg: DataConfig
    dataset: Dataset
    seed: int
    global_batch: int
    rank: int
    world_size: int
    max_images: int
    wanted: Wanted
    proposals: ProposalTable | None
    canvases: tuple[Canvas, ...] = ()  # empty: every batch has its own

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
        # Before the slice: a canvas of the global batch is the same at any world size.
        padding = self._padding(rows, keys)
        mine = rank_slice(self.global_batch, self.rank, self.world_size)
        rows, keys = rows[mine], keys[mine]
        batches = []
        # A forward pass of too many images does not fit the device; gradients add up over chunks.
        for chunk in chunks(len(rows), self.max_images):
            samples = [
                training_sample(self.cfg, self.dataset, int(row), drawn, self.wanted)
                for row, drawn in zip(rows[chunk], draw(self.cfg, keys[chunk]), strict=True)
            ]
            proposals = _canvas_proposals(self.proposals, samples)
            batches.append(collate(samples, padding, proposals, allocate))
        # Else each worker counts every page that it ever read as its own memory.
        self.dataset.let_go()
        return batches

    def _padding(self, rows: Ints, keys: Ints) -> Padding:
        canvas = smallest_holding(self.canvases, self._needed(rows, keys))
        return Padding(
            height=canvas.height,
            width=canvas.width,
            objects=canvas.objects,
            mask_side=self.cfg.mask_crop_side if self.wanted.masks else 0,
            num_keypoints=self.wanted.num_keypoints,
            num_proposals=self.proposals.most if self.proposals else 0,
        )

    def needed(self, step: int) -> Canvas:
        """The smallest canvas of a global batch. Every rank computes it from the index alone."""
        rows = self.order.rows(step)
        ids = self.dataset.index.values("image_id", rows)
        return self._needed(rows, noise_keys(self.seed, self.order.place(step).epoch, ids))

    def _needed(self, rows: Ints, keys: Ints) -> Canvas:
        index, cfg = self.dataset.index, self.cfg
        heights, widths = index.values("height", rows), index.values("width", rows)
        sizes = np.array(
            [
                resized_size(int(h), int(w), int(s), cfg.max_side_px)
                for h, w, s in zip(heights, widths, short_sides(cfg, keys), strict=True)
            ]
        )
        return Canvas(
            height=round_up(int(sizes[:, 0].max()), cfg.canvas_multiple_px),
            width=round_up(int(sizes[:, 1].max()), cfg.canvas_multiple_px),
            objects=padded_count(int(index.object_counts(rows, self.dataset.selection).max())),
        )


class TrainLoader:
    """Iterating yields `TrainStep`s without end, from `start_step` on.

    Step s is a pure function of (manifest, cfg, seed, global_batch, s), and a rank gets a
    contiguous slice of that global batch. So the state of the data is a step number and the
    manifest's hash, and a resumed run gives `start_step`.
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
        register: Register = unregistered,
    ):
        if global_batch < world_size:
            raise ValueError(
                f"loop.global_batch is {global_batch} for {world_size} ranks; each needs at least "
                "1 image"
            )
        if masks and not dataset.manifest.has_masks:
            raise ValueError(
                f"{dataset.store.name}: has no masks, the model trains some; set model.mask.kind "
                "to 'none'"
            )
        self.dataset = dataset.for_training(cfg.filter)
        self._start_step = start_step
        source = _TrainSource(
            cfg,
            self.dataset,
            seed,
            global_batch,
            rank,
            world_size,
            max_images_per_forward,
            Wanted(
                masks,
                num_keypoints,
                mirrored_keypoints(cfg, self.dataset.categories, num_keypoints),
            ),
            ProposalTable(proposals_uri) if proposals_uri else None,
        )
        if cfg.num_canvases:
            seen = range(min(source.order.steps_per_epoch, _STEPS_FOR_CANVASES))
            canvases = chosen_canvases([source.needed(step) for step in seen], cfg.num_canvases)
            source = replace(source, canvases=canvases)
        self._source = source
        self._stream: _Stream[TrainStep] = _Stream(self._source, cfg.num_loader_workers, register)

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
    """Batch number -> Batch."""

    cfg: DataConfig
    dataset: Dataset
    image: ImageInput
    batch_size: int
    proposals: ProposalTable | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_caches(self)

    @cached_property
    def order(self) -> Ints:
        """All rows of the view, the same on every rank.

        They are sorted by aspect ratio, so that a batch's images fill its canvas.
        """
        rows = np.array(self.dataset.rows(), np.int64)
        index = self.dataset.index
        aspect = index.values("width", rows) / index.values("height", rows)
        return np.asarray(rows[np.argsort(aspect, kind="stable")])

    def finish(self, _: int, batches: list[Batch]) -> Batch:
        return batches[0]

    def load(self, number: int, allocate: Allocate) -> list[Batch]:
        rows = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        samples = [self._sample(int(row)) for row in rows]
        multiple = self.image.canvas_multiple_px
        padding = Padding(
            height=round_up(max(sample.image.shape[1] for sample in samples), multiple),
            width=round_up(max(sample.image.shape[2] for sample in samples), multiple),
            objects=0,  # ground truth does not go through the model
            mask_side=0,
            num_keypoints=0,
            num_proposals=self.proposals.most if self.proposals else 0,
        )
        batch = collate(samples, padding, _canvas_proposals(self.proposals, samples), allocate)
        self.dataset.let_go()
        return [batch]

    def _sample(self, row_number: int) -> Sample:
        row = self.dataset.row(row_number)
        image = read_image(row, self.dataset)
        limits = (self.image.short_side_px, self.image.max_side_px)
        match self.image.resize:
            case "antialias":
                image = resize(image, *resized_size(row.height, row.width, *limits))
            case "torchvision-detection":
                size = torchvision_size(row.height, row.width, *limits)
                image = resize_without_antialias(image, *size)
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

    The list of batches does not depend on the world size W: rank r takes batches r, r + W, ...
    Ground truth stays in `.dataset`, which `evaluate` reads.
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
        register: Register = unregistered,
    ):
        self.dataset = dataset.for_evaluation(cfg)
        table = ProposalTable(proposals_uri) if proposals_uri else None
        self._source = _EvalSource(cfg, self.dataset, image, batch_size, table)
        self.num_batches = -(-len(self._source.order) // batch_size)  # over all ranks
        self._mine = range(rank, self.num_batches, world_size)
        # A worker without a batch would start for nothing.
        num_workers = min(cfg.num_loader_workers, len(self._mine))
        self._stream: _Stream[Batch] = _Stream(self._source, num_workers, register)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._mine)

    def __iter__(self) -> Iterator[Batch]:
        return self._stream.iterate(self._mine)

    def close(self) -> None:
        """Ends the workers."""
        self._stream.close()


def _canvas_proposals(table: ProposalTable | None, samples: Sequence[Sample]) -> list[Floats]:
    return [canvas_proposals(table, sample) for sample in samples] if table else []


def canvas_proposals(table: ProposalTable, sample: Sample) -> Floats:
    """The sample's proposals (Q, 4), scaled and flipped with its image."""
    boxes, _ = table.get(sample.image_id)
    (height, width), (_, new_height, new_width) = sample.original_size, sample.image.shape
    scaled = boxes.astype(np.float64) * np.tile([new_width / width, new_height / height], 2)
    return flip_boxes(scaled, new_width) if sample.flipped else scaled


# --- workers --------------------------------------------------------------------------------------


class _Source(Protocol[T_co]):
    """Number -> item, in two parts.

    `load` computes the batches, here or in a worker. `finish` makes an item of them, always here.
    """

    def load(self, number: int, allocate: Allocate, /) -> list[Batch]: ...

    def finish(self, number: int, batches: list[Batch], /) -> T_co: ...


class _Stream(Generic[T]):
    """The items of some numbers in their order, computed here or ahead of time in workers."""

    def __init__(self, source: _Source[T], num_workers: int, register: Register):
        self._source, self._num_workers, self._register = source, num_workers, register
        self._running: list[tuple[Any, Inbox]] = []

    def iterate(self, numbers: Iterable[int]) -> Iterator[T]:
        source = self._source
        if self._num_workers == 0:  # nothing crosses a process, so private memory will do
            return (source.finish(number, source.load(number, private_block)) for number in numbers)
        answers = iter(_worker_loader(source, numbers, self._num_workers))
        inbox = Inbox(self._register)
        self._running.append((answers, inbox))
        return self._opened(answers, inbox)

    def _opened(
        self, answers: Iterator[tuple[int, Parcel | Exception]], inbox: Inbox
    ) -> Iterator[T]:
        for number, answer in answers:
            if isinstance(answer, Exception):
                raise answer
            yield self._source.finish(number, inbox.open(answer))

    def close(self) -> None:
        """Ends the workers, and the registration of their blocks."""
        for answers, inbox in self._running:
            # torch has no public way; without it the workers end when the iterator is collected.
            answers._shutdown_workers()
            inbox.close()
        self._running.clear()


def _without_caches(record: Any) -> tuple[Any, ...]:
    """How a source is pickled: its fields, not the files that it has opened."""
    return type(record), tuple(getattr(record, f.name) for f in fields(record))


class _Numbered(TorchDataset[Any]):
    """Number -> (number, parcel or error).

    The consumer raises the error as it is. torch would wrap it into one with the worker's traceback
    as its message.
    """

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
    """A sampler that repeats an iterable of numbers, which may be endless."""

    def __init__(self, numbers: Iterable[int]):
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def _worker_loader(
    source: _Source[Any], numbers: Iterable[int], num_workers: int
) -> DataLoader[Any]:
    """torch's loader over worker processes."""
    # The fork server has imported this module and done nothing else, so a fork of it is safe beside
    # this process's threads, S3 clients and CUDA context.
    context = fork_server([__name__])
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
    """Runs first in each worker."""
    # The fork server has the environment of its own start. S3 credentials may have come later.
    os.environ.update(environment)
    torch.set_num_threads(1)  # else each worker starts as many threads as there are cores
    # torch's own watchdog looks at the fork server, which outlives a killed trainer
    end_with_starter()


__all__: Sequence[str] = ("EvalLoader", "TrainLoader", "TrainStep")
