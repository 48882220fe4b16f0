"""The metrics that an evaluation computes, by kind of result: the one list of their names.

A metric is `KIND/STATISTIC`. Evaluation computes it, a study asks for it, a report shows it.
Below the list: how any name becomes a key of MLflow, and any value a part of its search.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Collection
from functools import cache
from typing import get_args

from contract.model import MaskBranch, MaskLoss, ModelConfig, NoKeypoints

# pycocotools' summaries, in its order
BOX_STATS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")

# Masks again, by Boundary AP (Cheng et al. 2021): where `loop.eval_boundary` asks for it
BOUNDARY = "boundary"


@cache
def mask_inferences() -> tuple[str, ...]:
    """Every way in which some mask loss makes a mask of its logits, and is evaluated by."""
    losses = get_args(get_args(MaskLoss)[0])
    return tuple(dict.fromkeys(inference for loss in losses for inference in loss.inferences))


@cache
def all_kinds() -> tuple[str, ...]:
    """Every kind of result that some model is scored on."""
    masks = (f"segm-{name}" for name in mask_inferences())
    return ("bbox", "segm", *masks, BOUNDARY, "keypoints")


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


def metric_names(model: ModelConfig, boundary: bool = False) -> list[str]:
    """The names of all metrics of a model. boundary: with Boundary AP, where it has masks."""
    kinds = [*result_kinds(model)]
    kinds += [BOUNDARY] if boundary and "segm" in kinds else []
    return [f"{kind}/{name}" for kind in kinds for name in stats_of(kind)]


def all_metric_names() -> list[str]:
    """The names of all metrics of all models."""
    return [f"{kind}/{name}" for kind in all_kinds() for name in stats_of(kind)]


def check_metric(metric: str, where: str = "metrics") -> None:
    """Raises ValueError of one line, with the nearest name, if no model has this metric."""
    known = all_metric_names()
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.6)
        raise ValueError(
            f"{where}: no metric {metric!r}; did you mean {near[0] if near else 'segm/AP'!r}?"
        )


# --- as MLflow takes them ---

_REFUSED = re.compile(r"[^\w\-. :/]")  # in the key of a metric, a parameter or a tag
_LONGEST_KEY, _LONGEST_PART = 250, 200  # characters; a part leaves room for "keypoints/AP50/"


def tracker_keys(names: Collection[str]) -> dict[str, str]:
    """By name the key that MLflow takes. It is the name itself wherever that is possible.

    Two names never share a key: where they would, the changed ones end with a mark of their own.
    """
    return _apart({name: _key(name) for name in names})


def category_keys(categories: Collection[str]) -> dict[str, str]:
    """By category the part of a key: `tracker_keys` without a slash or a colon.

    Stores that keep a key as a file could not hold the category "a" beside "a/b".
    """
    parts = {name: re.sub("[:/]", "_", _key(name))[:_LONGEST_PART] for name in categories}
    return _apart(parts)


def _key(name: str) -> str:
    # MLflow reads a key as a path: it refuses one with empty parts, "." or "..", or one that begins
    # with two dots
    parts = [part for part in _REFUSED.sub("_", name[:_LONGEST_KEY]).split("/") if part]
    key = "/".join("_" * len(part) if part in (".", "..") else part for part in parts) or "_"
    return f"__{key[2:]}" if key.startswith("..") else key


def _apart(keys: dict[str, str]) -> dict[str, str]:
    shared = Counter(keys.values())
    return {
        name: key
        if key == name or shared[key] == 1
        else f"{key[: _LONGEST_PART - 9]}-{_mark(name)}"
        for name, key in keys.items()
    }


def _mark(name: str) -> str:
    """Of the name alone: it stays the same whatever other names come or go."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]


def renamed(keys: dict[str, str]) -> str:
    """The changed names in words, the first few of many; empty if there is none."""
    changed = [f"{name!r} as {key!r}" for name, key in keys.items() if name != key]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return ", ".join(changed[:5]) + more


def tag_condition(tag: str, value: str) -> str:
    """MLflow's search condition for the runs with this tag.

    Its language has no escape for quotes. Of a value with both kinds it may find other runs too,
    so the caller compares the value.
    """
    if "'" not in value:
        return f"tags.`{tag}` = '{value}'"
    if '"' not in value:
        return f'tags.`{tag}` = "{value}"'
    pattern = re.sub("['\"]", "_", value)
    return f"tags.`{tag}` LIKE '{pattern}'"
