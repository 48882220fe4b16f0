"""The metrics that a study may ask for."""

from __future__ import annotations

import difflib

METRIC_GROUPS = (
    "bbox",
    "segm",
    "segm-probability",
    "segm-argmax",
    "segm-versus_background",
    "keypoints",
)

METRIC_STATS = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR20",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)


def check_metric(metric: str) -> None:
    group, _, stat = metric.partition("/")
    if group not in METRIC_GROUPS or stat not in METRIC_STATS:
        known = [f"{g}/{s}" for g in METRIC_GROUPS for s in METRIC_STATS]
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.6)
        raise ValueError(
            f"metrics: no metric {metric!r}; did you mean {near[0] if near else 'segm/AP'!r}?"
        )
