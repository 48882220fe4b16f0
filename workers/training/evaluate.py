"""Evaluation over all ranks: each image once, and the score of a single process to the bit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from contract.metrics import BOUNDARY, metric_names
from contract.model import ModelConfig
from contract.recipe import EvalPrecision, LoopConfig, RunConfig
from model.structures import Batch
from pipelines.evaluate.engines import IouType
from pipelines.evaluate.evaluation import evaluate
from pipelines.evaluate.matches import Matches, evaluate_and_match
from pipelines.shards.dataset import Dataset
from workers.training.prefetch import on_device
from workers.training.results import CocoResult, Encoder, EncodingProcesses, Results
from workers.training.world import World
from workers.trial.errors import FEWER_EVALUATED, memory_explained


class Batches(Protocol):
    """This rank's part of the validation batches, and their number over all ranks."""

    num_batches: int
    dataset: Dataset

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Scores:
    """What an evaluation gives on rank 0. On the other ranks all are empty.

    metrics: "bbox/AP", "segm/AP75", "segm-argmax/AP", ... per_class: for names like "segm/AP", the
    value of each category. results: every detection. matches: by kind of result, if asked for.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    results: Results
    matches: dict[str, Matches] = field(default_factory=dict)


def evaluate_detector(
    model: ModelConfig,
    detector: nn.Module,
    batches: Batches,
    world: World,
    stopping: Callable[[], bool] = lambda: False,
    precision: EvalPrecision = "fp32",
    num_processes: int = 0,
    boundary: bool = False,
    keep_matches: bool = False,
) -> Scores | None:
    """Predicts and scores all images. Returns None on all ranks if some rank is `stopping`.

    num_processes: of this rank, which paste and encode masks; 0 does it between two batches.
    boundary: with Boundary AP. keep_matches: with what `Scores.matches` holds.
    """
    stream = on_device(([batch] for batch in batches), world.device)
    was_training = detector.training
    detector.eval()
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16")
    processes = EncodingProcesses(num_processes) if num_processes else nullcontext()
    mine: Results = {}
    broken = False
    try:
        with processes as pool:
            encoder = Encoder(model, batches.dataset.category_ids, pool)
            for first in range(0, batches.num_batches, world.size):
                # ranks must leave together: one that stopped alone would leave the others in
                # `gather`
                if world.sum_on_host(torch.tensor(float(stopping()))).item():
                    return None
                if first + world.rank < batches.num_batches:
                    [batch] = next(stream)
                    with memory_explained([batch.images], world.device, FEWER_EVALUATED), autocast:
                        detections = detector.predict(batch)  # type: ignore[operator]
                    encoder.add(detections)
            mine = encoder.finish()
    except BrokenExecutor:
        # a signal to the whole process group ended the encoding processes, too
        if not stopping():
            raise
        broken = True
    finally:
        stream.close()
        detector.train(was_training)
    # this vote may meet that of a rank which is still in the loop: then both leave
    if world.sum_on_host(torch.tensor(float(broken))).item():
        return None
    gathered = world.gather(mine)
    if not gathered:
        return Scores({}, {}, {})
    # the order of the ranks' parts does not matter: `evaluate` sorts the results
    together = {kind: [r for part in gathered for r in part[kind]] for kind in mine}
    return score(batches.dataset, together, boundary, keep_matches)


def num_processes(run: RunConfig, world: World) -> int:
    """How many processes encode masks for this rank.

    On a GPU as many as load its images. On a CPU none: the detector takes all of its cores.
    """
    return 0 if world.device.type == "cpu" else run.data.num_loader_workers


def best_metric(run: RunConfig) -> str:
    """The metric that chooses the best weights.

    Raises ValueError if the model is not scored on it.
    """
    wanted, names = run.loop.best_metric, metric_names(run.model, run.loop.eval_boundary)
    if wanted in names:
        return wanted
    if wanted == LoopConfig().best_metric:  # the default serves models without masks too
        return "bbox/AP"
    [near] = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    raise ValueError(
        f"loop.best_metric: this model has no metric {wanted!r}; did you mean {near!r}?"
    )


def score(
    dataset: Dataset,
    results: Mapping[str, list[CocoResult]],
    boundary: bool = False,
    keep_matches: bool = False,
) -> Scores:
    """pycocotools' numbers for every kind of result, and Boundary AP of masks where asked for."""
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    matches: dict[str, Matches] = {}
    compared = dict(results)
    if boundary and "segm" in results:
        compared[BOUNDARY] = results["segm"]
    for kind, of_kind in compared.items():
        by_boundary = kind == BOUNDARY
        iou_type: IouType = (
            "segm" if by_boundary or kind.startswith("segm") else kind  # type: ignore[assignment]
        )
        if keep_matches:
            evaluation, matches[kind] = evaluate_and_match(dataset, of_kind, iou_type, by_boundary)
        else:
            evaluation = evaluate(dataset, of_kind, iou_type, boundary=by_boundary)
        metrics |= {f"{kind}/{name}": value for name, value in evaluation.stats.items()}
        per_class |= {f"{kind}/{name}": values for name, values in evaluation.per_class.items()}
    return Scores(metrics, per_class, dict(results), matches)
