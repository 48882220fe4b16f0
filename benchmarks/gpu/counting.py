"""One step of a preset on the null CUDA: its operations, waits, copies, bytes and memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import torch

from benchmarks.gpu.parts import Parts
from benchmarks.gpu.traffic import Traffic, counted
from benchmarks.gpu.work import Work, WorkerStep, batch_of, detector_of
from model.detector import Detector
from tests.nullgpu import null_cuda
from workers.training.meter import Meter
from workers.training.prefetch import on_device
from workers.training.results import Encoder
from workers.trial.flags import FlagReader


@dataclass(frozen=True)
class Counted:
    """Counters are by part, waits and pageable copies by what and where."""

    operations: Counter[str]
    waits: Counter[str]
    pageable: Counter[str]
    traffic: Traffic
    peak_gib: float
    kernels: Counter[str]
    figures: dict[str, int]


def count(work: Work, predict: bool) -> Counted:
    """Counts the third step: the first two fill caches and make the optimiser's state."""
    gc.collect()  # what an earlier preset left
    detector = detector_of(work.model, "cuda")
    step = _prediction(work, detector) if predict else _training(work, detector)
    parts = Parts(detector)
    # in one thread, so that a node's label holds for the launches behind it
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            parts.begin()
            step()
        parts.begin()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        null_cuda.reset()
        with null_cuda.watched(parts):
            step()
        figures, kernels = null_cuda.figures(), null_cuda.kernels()
        peak = torch.cuda.max_memory_allocated() / 2**30
        found = (Counter(parts.operations), Counter(parts.waits), Counter(parts.pageable))
        parts.begin()
        with counted(traffic := Traffic(parts.now)):
            step()
    parts.begin()  # its autograd nodes hold memory
    assert found[0].total() == null_cuda.operations(figures)
    return Counted(*found, traffic, peak, kernels, figures)


def _training(work: Work, detector: Detector) -> Callable[[], None]:
    """What the loop of the workers does in a step on which no value is due."""
    step, batch = WorkerStep(detector, work.precision), batch_of(work)
    meter, flags = Meter(), FlagReader(step.world.device)
    # the loader's blocks are registered with CUDA
    batches = on_device(repeat([batch.pin_memory()]), step.world.device)

    def run() -> None:
        [there] = next(batches)
        gradients = step.gradients(there)
        meter.add(0, gradients, step.apply(), {})
        flags.read(gradients.flags)

    return run


def _prediction(work: Work, detector: Detector) -> Callable[[], None]:
    """What the workers' evaluation does with a batch. There are no detections: all scores are 0."""
    detector.eval()
    encoder = Encoder(work.model, list(range(1, work.model.num_classes + 1)))
    device = next(detector.parameters()).device
    batches = on_device(repeat([batch_of(work).pin_memory()]), device)

    def run() -> None:
        [there] = next(batches)
        encoder.add(detector.predict(there))

    return run
