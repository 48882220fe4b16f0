"""In what a run differs from the run behind a published row, field by field, and what that costs.

Every field counts as fatal unless it is named here: a field that somebody adds tomorrow costs the
paper's column until somebody says that it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from contract.recipe import RunConfig, apply_overrides

# Places and machinery: they change no number, or nothing but the noise of a seed.
_FREE = (
    "seed",
    *("data.train", "data.val", "data.num_loader_workers", "data.cache_gib"),
    *("data.canvas_multiple_px", "data.num_canvases"),
    *("data.shuffle_window_shards", "data.bucket_batches"),
    *("loop.max_images_per_forward", "loop.compile", "loop.cuda_graphs", "loop.log_every_steps"),
    *("loop.checkpoint_every_steps", "loop.keep_checkpoints", "loop.best_metric"),
    *("loop.eval_every_steps", "loop.eval_batch", "loop.eval_boundary", "loop.guard"),
    *("model.image.canvas_multiple_px", "model.proposals.uri"),
)
# They move the AP of all arms alike, so the difference between arms stays comparable. The last
# lines are choices that the paper does not state.
_NOTED = (
    *("model.weights", "model.backbone.stride_in_1x1"),
    *("model.image.mean", "model.image.std", "model.image.channels"),
    *("schedule.warmup_steps", "schedule.warmup_factor"),
    *("model.roi.aligned", "model.anchors.rounded", "model.image.resize"),
    *("model.mask.paste", "model.keypoints.half_pixel_px"),
    "model.proposals",
    *("loop.precision", "loop.eval_precision", "loop.gpu"),
    *("model.mask.loss.others", "model.mask.loss.inference"),
    "model.layout.channels",
)


_LONGEST = 80  # characters of a value: a record may come from anybody


@dataclass(frozen=True)
class Deviation:
    """One field that differs. fatal: it costs the column; else it leaves the difference alone."""

    field: str
    ours: str
    paper: str
    fatal: bool

    @property
    def text(self) -> str:
        return f"{self.field} is {self.ours}, the paper's is {self.paper}"


def deviations(ours: RunConfig, paper: RunConfig) -> tuple[Deviation, ...]:
    """All of them, in the order of the record."""
    return tuple(
        Deviation(path, _words(one), _words(other), not _is_in(path, _NOTED))
        for path, one, other in _differences(_plain(ours), _plain(paper))
        if not _is_in(path, _FREE)
    )


def _plain(run: RunConfig) -> dict[str, JsonValue]:
    """The record with the full rate as it is applied: two ways to write one rate are one."""
    rate, batch = run.optimiser.lr, run.optimiser.lr_batch
    applied = rate * run.loop.global_batch / batch if batch else rate
    data = run.model_dump(mode="json")
    return apply_overrides(data, {"optimiser.lr": applied, "optimiser.lr_batch": 0})


def _differences(
    ours: JsonValue, paper: JsonValue, path: str = ""
) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """(path, ours, the paper's). Records of two kinds have no field in common but the kind."""
    if isinstance(ours, dict) and isinstance(paper, dict) and _kind(ours) == _kind(paper):
        for name in dict.fromkeys([*ours, *paper]):
            below = f"{path}.{name}".lstrip(".")
            yield from _differences(ours.get(name), paper.get(name), below)
    elif isinstance(ours, float) and isinstance(paper, float):
        if not math.isclose(ours, paper, rel_tol=1e-6):
            yield path, ours, paper
    elif ours != paper:
        yield path, ours, paper


def _kind(record: Mapping[str, JsonValue]) -> JsonValue:
    return record.get("kind")


def _is_in(path: str, fields: tuple[str, ...]) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in fields)


def _words(value: JsonValue) -> str:
    if isinstance(value, dict):
        parts = (value.get(name) for name in ("kind", "name", "path", "uri"))
        text = " ".join(str(part) for part in parts if part)
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
