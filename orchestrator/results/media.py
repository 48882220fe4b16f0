"""Curves and pictures that trials left in their folders."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from contract.answers import TrialView
from orchestrator.results.cells import arm_label
from orchestrator.results.comparison import Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.plots import Curve
from orchestrator.settings import service_files

# The page holds everything in one file that people mail to each other.
MAX_PICTURE_BYTES = 4 * 2**20
MAX_PICTURES = 12
MAX_CURVES = 60
_PNG, _JPEG = b"\x89PNG", b"\xff\xd8"  # how files of these kinds begin


@dataclass(frozen=True)
class Picture:
    """`kind` is the media type of `data`."""

    caption: str
    kind: str
    data: bytes

    @property
    def url(self) -> str:
        """The picture itself as a URL: the page fetches nothing."""
        return f"data:{self.kind};base64,{base64.b64encode(self.data).decode()}"


def loss_curves(facts: Facts, comparison: Comparison) -> list[Curve]:
    """The total loss of every finished trial whose series is there."""
    from pyarrow import parquet  # heavy: a text table does without it

    curves: list[Curve] = []
    for arm in comparison.arms:
        for trial in arm.trials:
            raw = _artifact(facts, trial, "series")
            if raw is None or len(curves) == MAX_CURVES:
                continue  # a trial that has not ended has no series
            table = parquet.read_table(io.BytesIO(raw))
            if {"step", "loss"} <= set(table.column_names):
                steps, values = (table.column(name).to_pylist() for name in ("step", "loss"))
                curves.append(Curve(trial.key, arm_label(arm), arm.baseline, steps, values))
    return curves


def pictures(facts: Facts, comparison: Comparison) -> list[Picture]:
    """The picture of the first trial of each arm that drew its validation images."""
    chosen = (_first_picture(facts, arm.trials) for arm in comparison.arms[:MAX_PICTURES])
    return [picture for picture in chosen if picture is not None]


def _first_picture(facts: Facts, trials: Sequence[TrialView]) -> Picture | None:
    for trial in trials:
        raw = _artifact(facts, trial, "picture/last")
        # By its bytes, not by its name: an SVG, for one, could hold a script.
        if raw is not None and len(raw) <= MAX_PICTURE_BYTES and raw.startswith((_PNG, _JPEG)):
            kind = "image/png" if raw.startswith(_PNG) else "image/jpeg"
            return Picture(trial.key, kind, raw)
    return None


def _artifact(facts: Facts, trial: TrialView, name: str) -> bytes | None:
    path = facts.trials[trial.trial].result.artifacts.get(name, "")
    # A result is a stranger's input: it names files below its own folder only.
    if not path or ".." in path.split("/") or path.startswith("/"):
        return None
    return service_files(trial.storage).read_part(path)
