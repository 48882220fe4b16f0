"""Evaluation over all ranks: each image once, masks as run-length codes, the score of a single process to the bit."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

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
from workers.training.world import World
from workers.trial.causes import FEWER_EVALUATED, memory_explained

ImageResults = dict[str, list[dict[str, Any]]]  # kind of result -> COCO results


class Batches(Protocol):
    """This rank's part of the validation batches, and how many there are over all ranks."""

    num_batches: int
    dataset: Dataset

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Scores:
    """metrics: "bbox/AP", "segm/AP75", "segm-argmax/AP", ... per_class: "segm/AP" -> category -> value.

    results: "bbox", "segm", ... -> COCO results; on rank 0 alone, empty elsewhere. So are the others.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    results: ImageResults


def evaluate_detector(
    model: ModelConfig,
    detector: nn.Module,
    batches: Batches,
    world: World,
    stopping: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Predicts and scores every image of `batches`. None on every rank if some rank was `stopping`."""
    mine: ImageResults = {kind: [] for kind in result_kinds(model)}
    stream = iter(batches)
    was_training = detector.training
    detector.eval()
    try:
        for first in range(0, batches.num_batches, world.size):
            if world.sum_on_host(torch.tensor(float(stopping()))).item():
                return None
            if first + world.rank < batches.num_batches:
                batch = next(stream).to(world.device)
                with memory_explained([batch.images], world.device, FEWER_EVALUATED):
                    found = detector.predict(batch)  # type: ignore[operator]
                for kind, results in coco_results(
                    model, found, batches.dataset.category_ids
                ).items():
                    mine[kind] += results
    finally:
        detector.train(was_training)
    gathered = world.gather(mine)
    if not gathered:
        return Scores({}, {}, {})
    return score(
        batches.dataset, {kind: [r for part in gathered for r in part[kind]] for kind in mine}
    )


def best_metric(run: RunConfig) -> str:
    """What the best weights are chosen by. Raises ValueError if the model is not scored on it."""
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
    model: ModelConfig, found: Detections, category_ids: Sequence[int]
) -> ImageResults:
    """The detections of a batch as COCO results of every kind that the model is scored on."""
    found = _on_host(found)
    results: ImageResults = {kind: [] for kind in result_kinds(model)}
    for index in range(len(found.sample_ids)):
        kept = found.valid[index]
        boxes, image_id = found.boxes_xyxy[index, kept], int(found.sample_ids[index])
        arguments = (
            image_id,
            boxes.numpy(),
            found.scores[index, kept].numpy(),
            found.labels[index, kept].numpy(),
        )
        results["bbox"] += image_results(*arguments, category_ids)
        height, width = found.image_sizes[index].tolist()
        for number, (name, masks_BDMM) in enumerate(found.masks.items()):
            kinds = [
                kind
                for kind in (f"segm-{name}", *(["segm"] if number == 0 else []))
                if kind in results
            ]
            if kinds:
                rles = [
                    _encoded(mask, box, height, width)
                    for mask, box in zip(masks_BDMM[index, kept], boxes, strict=True)
                ]
                for kind in kinds:
                    results[kind] += image_results(*arguments, category_ids, rles=rles)
        if "keypoints" in results:
            points = found.keypoints[index, kept].numpy()
            results["keypoints"] += image_results(*arguments, category_ids, keypoints=points)
    return results


def _encoded(
    mask_MM: torch.Tensor, box_xyxy: torch.Tensor, height: int, width: int
) -> dict[str, Any]:
    crop, top, left = paste_mask(mask_MM, box_xyxy, height, width)
    return encode_crop(crop.numpy(), top, left, height, width)


def _on_host(found: Detections) -> Detections:
    tensors = {
        name: value.cpu() for name, value in vars(found).items() if isinstance(value, torch.Tensor)
    }
    return replace(
        found, masks={name: masks.float().cpu() for name, masks in found.masks.items()}, **tensors
    )


def score(dataset: Dataset, results: Mapping[str, list[dict[str, Any]]]) -> Scores:
    """pycocotools' numbers for every kind of result."""
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    for kind, found in results.items():
        evaluation = evaluate(dataset, found, "segm" if kind.startswith("segm") else kind)  # type: ignore[arg-type]
        metrics |= {f"{kind}/{name}": value for name, value in evaluation.stats.items()}
        per_class |= {f"{kind}/{name}": values for name, values in evaluation.per_class.items()}
    return Scores(metrics, per_class, dict(results))
