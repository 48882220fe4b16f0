"""The metrics that an evaluation computes, by kind of result: the one list of their names.

A metric is `KIND/STATISTIC`. Evaluation computes it, a study asks for it, a report shows it.
"""

from __future__ import annotations

import difflib
from typing import get_args

from contract.model import MaskBranch, MaskLoss, ModelConfig, NoKeypoints

# pycocotools' summaries, in its order
BOX_STATS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")

# Every way in which some mask loss makes a mask of its logits, and is evaluated by.
MASK_INFERENCES: tuple[str, ...] = tuple(
    dict.fromkeys(
        inference for loss in get_args(get_args(MaskLoss)[0]) for inference in loss.inferences
    )
)
KINDS = ("bbox", "segm", *(f"segm-{name}" for name in MASK_INFERENCES), "keypoints")


def result_kinds(model: ModelConfig) -> tuple[str, ...]:
    """The kinds of result that this model is scored on."""
    kinds = ["bbox"]
    if isinstance(model.mask, MaskBranch):
        kinds += ["segm", *(f"segm-{name}" for name in model.mask.loss.inferences)]
    if not isinstance(model.keypoints, NoKeypoints):
        kinds.append("keypoints")
    return tuple(kinds)


def stats_of(kind: str) -> tuple[str, ...]:
    """The statistics of one kind of result."""
    return KEYPOINT_STATS if kind == "keypoints" else BOX_STATS


def metric_names(model: ModelConfig) -> list[str]:
    """The names of all metrics of a model."""
    return [f"{kind}/{name}" for kind in result_kinds(model) for name in stats_of(kind)]


def all_metric_names() -> list[str]:
    """The names of all metrics of all models."""
    return [f"{kind}/{name}" for kind in KINDS for name in stats_of(kind)]


def check_metric(metric: str, where: str = "metrics") -> None:
    """Raises ValueError of one line, with the nearest name, if no model has this metric."""
    known = all_metric_names()
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.6)
        raise ValueError(
            f"{where}: no metric {metric!r}; did you mean {near[0] if near else 'segm/AP'!r}?"
        )
