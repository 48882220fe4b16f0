"""Curves and pictures that trials left in their folders."""

from __future__ import annotations

import io
from collections.abc import Sequence

from contract.answers import TrialView
from orchestrator.results.facts import Facts
from orchestrator.results.plots import Curve
from orchestrator.results.statistics import Comparison
from orchestrator.results.table import arm_label
from orchestrator.settings import service_files

MAX_PICTURE_BYTES = 4 * 2**20
MAX_PICTURES = 12
MAX_CURVES = 60
_PNG, _JPEG = b"\x89PNG", b"\xff\xd8"


def loss_curves(facts: Facts, comparison: Comparison) -> list[Curve]:
    """The total loss of every finished trial whose series is there."""
    from pyarrow import parquet

    curves: list[Curve] = []
    for arm in comparison.arms:
        for trial in arm.trials:
            raw = _artifact(facts, trial, "series")
            if raw is None or len(curves) == MAX_CURVES:
                continue
            table = parquet.read_table(io.BytesIO(raw))
            if {"step", "loss"} <= set(table.column_names):
                steps, values = table["step"].to_pylist(), table["loss"].to_pylist()
                curves.append(Curve(trial.key, arm_label(arm), arm.baseline, steps, values))
    return curves


def pictures(facts: Facts, comparison: Comparison) -> list[tuple[str, str, bytes]]:
    """(caption, media type, bytes) of the first trial of each arm that drew its validation images."""
    found: list[tuple[str, str, bytes]] = []
    for arm in comparison.arms[:MAX_PICTURES]:
        picture = _first_picture(facts, arm.trials)
        if picture is not None:
            found.append(picture)
    return found


def _first_picture(facts: Facts, trials: Sequence[TrialView]) -> tuple[str, str, bytes] | None:
    for trial in trials:
        raw = _artifact(facts, trial, "picture/last")
        if raw is not None and len(raw) <= MAX_PICTURE_BYTES and raw.startswith((_PNG, _JPEG)):
            return trial.key, "image/png" if raw.startswith(_PNG) else "image/jpeg", raw
    return None


def _artifact(facts: Facts, trial: TrialView, name: str) -> bytes | None:
    path = str(facts.trials[trial.trial].result.get("artifacts", {}).get(name, ""))
    if not path or ".." in path.split("/") or path.startswith("/"):
        return None  # a result names files below its own folder only
    return service_files(trial.storage).read_part(path)
