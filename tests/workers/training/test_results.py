"""Results are the same whoever encodes them, in the order of the batches, and nothing is left."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from contract.presets import preset
from model.structures import Batch, Detections
from tests.builders import tiny_run
from tests.workers.fakes import alone
from workers.training.build import eval_loader, initial_detector, open_datasets
from workers.training.evaluate import evaluate_detector, num_processes
from workers.training.results import (
    Encoder,
    EncodingProcesses,
    HostCopy,
    _named,
    _packed,
    _unpacked,
    coco_results,
)
from workers.training.world import World

MODEL = preset("tiny")
IDS = [1, 2, 3, 4]


def drawn(first_id: int, images: int = 3, kept: int = 4) -> Detections:
    """Detections of images of 60 x 90 px; the last of 5 slots are padding."""
    generator = torch.Generator().manual_seed(first_id)
    start = torch.rand(images, 5, 2, generator=generator) * 50
    return Detections(
        boxes_xyxy=torch.cat([start, start + 20], dim=2),
        scores=torch.rand(images, 5, generator=generator),
        labels=torch.randint(0, 4, (images, 5), generator=generator),
        valid=(torch.arange(5) < kept).expand(images, -1),
        masks={"sigmoid": torch.rand(images, 5, 28, 28, generator=generator)},
        keypoints=torch.zeros(images, 5, 0, 3),
        image_sizes=torch.tensor([[60, 90]] * images),
        sample_ids=torch.arange(first_id, first_id + images),
    )


BATCHES = [drawn(1), drawn(4, kept=0), drawn(7, images=1), drawn(8), drawn(11, kept=5)]


def encoded(pool: Executor | None) -> dict[str, list[dict[str, Any]]]:
    encoder = Encoder(MODEL, IDS, pool)
    for batch in BATCHES:
        encoder.add(batch)
    return encoder.finish()


def test_a_pool_gives_the_results_of_every_batch_in_order():
    parts = [coco_results(MODEL, batch, IDS) for batch in BATCHES]
    expected = {kind: [r for part in parts for r in part[kind]] for kind in parts[0]}
    assert [r["image_id"] for r in expected["segm"]] == sorted(
        [i for i in (1, 2, 3, 7, 8, 9, 10) for _ in range(4)]
        + [i for i in (11, 12, 13) for _ in range(5)]
    )
    assert encoded(None) == expected
    with ThreadPoolExecutor(3) as pool:
        assert encoded(pool) == expected


def test_without_a_batch_there_is_no_result():
    assert Encoder(MODEL, IDS).finish() == {kind: [] for kind in coco_results(MODEL, drawn(1), IDS)}


class Counting(ThreadPoolExecutor):
    """Counts the images that were given and are not done."""

    def __init__(self) -> None:
        super().__init__(1)
        self.under_way, self.most = set[Future[Any]](), 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        self.under_way = {other for other in self.under_way if not other.done()} | {future}
        self.most = max(self.most, len(self.under_way))
        return future


def test_no_more_than_three_batches_have_their_masks_in_memory():
    with Counting() as pool:
        encoder = Encoder(MODEL, IDS, pool)
        for first in range(0, 60, 3):
            encoder.add(drawn(first))
        encoder.finish()
    assert pool.most <= 9


def test_packed_detections_come_back_as_they_were():
    batch = drawn(5)
    packed, layout = _packed(batch)
    back = _unpacked(packed, batch, layout)
    assert packed.dtype == torch.uint8
    assert list(back.masks) == list(batch.masks)
    for name, tensor in _named(batch).items():
        assert torch.equal(_named(back)[name], tensor), name
    # On the CPU there is nothing to copy.
    assert HostCopy(batch).wait() is batch


def failing(_: Any) -> None:
    raise RuntimeError("the image has a bug")


def test_an_error_of_an_image_ends_the_evaluation(monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        encoder = Encoder(MODEL, IDS, pool)
        monkeypatch.setattr(encoder, "_encode", failing)
        encoder.add(drawn(1))
        with pytest.raises(RuntimeError, match="the image has a bug"):
            encoder.finish()


def test_a_cpu_encodes_without_processes():
    run = tiny_run({"data.num_loader_workers": 3})
    assert num_processes(run, alone()) == 0
    assert num_processes(run, World(0, 1, torch.device("cuda", 0))) == 3


class Recording(nn.Module):
    """Says in which precision it is asked to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def predict(self, batch: Batch) -> Detections:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        sizes, ids = batch.original_sizes, batch.sample_ids
        return replace(drawn(1, len(batch)), image_sizes=sizes, sample_ids=ids)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_record_decides_the_precision(packed, precision):
    run = tiny_run({"loop.eval_precision": precision, "loop.eval_batch": 3}, *packed)
    _, data = open_datasets(run, "")
    detector = Recording()
    scores = evaluate_detector(
        run.model,
        detector,
        eval_loader(run, data, alone()),
        alone(),
        precision=run.loop.eval_precision,
    )
    assert scores is not None
    assert detector.seen == [precision == "bf16"] * 2  # 4 images
    assert not torch.is_autocast_enabled("cpu")


# --- processes ------------------------------------------------------------------------------------


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


@pytest.mark.slow
def test_processes_give_the_same_scores_and_end_with_the_evaluation(packed):
    run = tiny_run({"loop.eval_batch": 1}, *packed)
    _, data = open_datasets(run, "")
    detector, world = initial_detector(run, alone().device), alone()

    def scores(processes: int, stopping: Callable[[], bool] = lambda: False) -> Any:
        batches = eval_loader(run, data, world)
        return evaluate_detector(
            run.model, detector, batches, world, stopping, num_processes=processes
        )

    before = children()
    expected = scores(0)
    assert expected.results["segm"]
    assert scores(2) == expected
    assert children() == before
    asked = iter([False, False, True])
    assert scores(2, lambda: next(asked)) is None
    assert children() == before


def wait_for_processes(pids: Any) -> None:
    with EncodingProcesses(1) as pool:
        pids.send(pool.submit(os.getpid).result())
        time.sleep(600)


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_process():
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("spawn").Process(
        target=wait_for_processes, args=(theirs,)
    )
    trainer.start()
    pid = ours.recv()
    # a descriptor, since another process may get the number of one that has ended
    encoder = os.pidfd_open(pid)
    assert trainer.pid
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    assert multiprocessing.connection.wait([encoder], timeout=60) == [encoder]
    os.close(encoder)
