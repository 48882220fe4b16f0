"""Evaluation over all ranks: each image once, and the score of a single process to the bit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from contract.metrics import metric_names, result_kinds
from contract.model import ModelConfig
from contract.recipe import LoopConfig, RunConfig
from model.branches.paste import paste_mask
from model.structures import Batch, Detections
from pipelines.evaluate.evaluation import (
    encode_crop,
    evaluate,
    image_results,
)
from pipelines.shards.dataset import Dataset
from workers.training.prefetch import on_device
from workers.training.world import World
from workers.trial.causes import FEWER_EVALUATED, memory_explained

CocoResult: TypeAlias = dict[str, Any]  # one detection in COCO's own JSON
Results: TypeAlias = dict[str, list[CocoResult]]  # by kind: "bbox", "segm", "keypoints", ...


class Batches(Protocol):
    """This rank's part of the validation batches, and their number over all ranks."""

    num_batches: int
    dataset: Dataset

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Scores:
    """What an evaluation gives on rank 0. On the other ranks all three are empty.

    metrics: "bbox/AP", "segm/AP75", "segm-argmax/AP", ... per_class: for names like "segm/AP", the
    value of each category. results: every detection.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    results: Results


def evaluate_detector(
    model: ModelConfig,
    detector: nn.Module,
    batches: Batches,
    world: World,
    stopping: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Predicts and scores all images. Returns None on all ranks if some rank is `stopping`."""
    mine: Results = {kind: [] for kind in result_kinds(model)}
    stream = on_device(([batch] for batch in batches), world.device)
    was_training = detector.training
    detector.eval()
    try:
        for first in range(0, batches.num_batches, world.size):
            # ranks must leave together: one that stopped alone would leave the others in `gather`
            if world.sum_on_host(torch.tensor(float(stopping()))).item():
                return None
            if first + world.rank < batches.num_batches:
                [batch] = next(stream)
                with memory_explained([batch.images], world.device, FEWER_EVALUATED):
                    detections = detector.predict(batch)  # type: ignore[operator]
                results = coco_results(model, detections, batches.dataset.category_ids)
                for kind in mine:
                    mine[kind] += results[kind]
    finally:
        stream.close()
        detector.train(was_training)
    gathered = world.gather(mine)
    if not gathered:
        return Scores({}, {}, {})
    # the order of the ranks' parts does not matter: `evaluate` sorts the results
    together = {kind: [r for part in gathered for r in part[kind]] for kind in mine}
    return score(batches.dataset, together)


def best_metric(run: RunConfig) -> str:
    """The metric that chooses the best weights.

    Raises ValueError if the model is not scored on it.
    """
    wanted, names = run.loop.best_metric, metric_names(run.model)
    if wanted in names:
        return wanted
    if wanted == LoopConfig().best_metric:  # the default serves models without masks too
        return "bbox/AP"
    [near] = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    raise ValueError(
        f"loop.best_metric: this model has no metric {wanted!r}; did you mean {near!r}?"
    )


def coco_results(
    model: ModelConfig, detections: Detections, category_ids: Sequence[int]
) -> Results:
    """The detections of a batch as COCO results of every kind that the model is scored on."""
    batch = _on_host(detections)
    results: Results = {kind: [] for kind in result_kinds(model)}
    for index in range(len(batch.sample_ids)):
        kept = batch.valid[index]  # the rest of a row is padding
        boxes = batch.boxes_xyxy[index, kept]
        image = partial(
            image_results,
            int(batch.sample_ids[index]),
            boxes.numpy(),
            batch.scores[index, kept].numpy(),
            batch.labels[index, kept].numpy(),
            category_ids,
        )
        results["bbox"] += image()
        height, width = batch.image_sizes[index].tolist()
        for number, (name, masks_BDMM) in enumerate(batch.masks.items()):
            # the first inference is the one that the model is known by: it counts as "segm", too
            kinds = [f"segm-{name}", "segm"] if number == 0 else [f"segm-{name}"]
            wanted = [kind for kind in kinds if kind in results]
            if wanted:
                rles = [
                    _encoded(mask, box, height, width)
                    for mask, box in zip(masks_BDMM[index, kept], boxes, strict=True)
                ]
                for kind in wanted:
                    results[kind] += image(rles=rles)
        if "keypoints" in results:
            results["keypoints"] += image(keypoints=batch.keypoints[index, kept].numpy())
    return results


def _encoded(mask_MM: Tensor, box_xyxy: Tensor, height: int, width: int) -> dict[str, Any]:
    # encoded at once: full-size masks of all detections would fill the memory
    crop, top, left = paste_mask(mask_MM, box_xyxy, height, width)
    return encode_crop(crop.numpy(), top, left, height, width)


def _on_host(detections: Detections) -> Detections:
    tensors = {n: value.cpu() for n, value in vars(detections).items() if isinstance(value, Tensor)}
    masks = {name: masks.float().cpu() for name, masks in detections.masks.items()}
    return replace(detections, masks=masks, **tensors)


def score(dataset: Dataset, results: Mapping[str, list[CocoResult]]) -> Scores:
    """pycocotools' numbers for every kind of result."""
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    for kind, of_kind in results.items():
        iou_type = "segm" if kind.startswith("segm") else kind
        evaluation = evaluate(dataset, of_kind, iou_type)  # type: ignore[arg-type]
        metrics |= {f"{kind}/{name}": value for name, value in evaluation.stats.items()}
        per_class |= {f"{kind}/{name}": values for name, values in evaluation.per_class.items()}
    return Scores(metrics, per_class, dict(results))
