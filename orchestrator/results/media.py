"""Curves and pictures that trials left in their folders."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from contract.answers import TrialView
from orchestrator.results.cells import arm_label
from orchestrator.results.comparison import Arm, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.plots.curves import Curve
from orchestrator.settings import service_files
from orchestrator.study.contrasts import arm_name

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


def loss_curves(facts: Facts, comparison: Comparison) -> dict[str, list[Curve]]:
    """Loss -> its curves, of every finished trial whose series is there; the total comes first."""
    from pyarrow import parquet  # heavy: a text table does without it

    curves: dict[str, list[Curve]] = {}
    trials = [(arm, trial) for arm in comparison.arms for trial in arm.trials]
    count = 0
    for arm, trial in trials:
        raw = _artifact(facts, trial, "series") if count < MAX_CURVES else None
        if raw is None:
            continue  # a trial that has not ended has no series
        table = parquet.read_table(io.BytesIO(raw))
        names = sorted(n for n in table.column_names if n == "loss" or n.startswith("loss/"))
        if "step" not in table.column_names:
            continue
        count += 1
        steps = table.column("step").to_pylist()
        for name in names:
            values = table.column(name).to_pylist()
            curves.setdefault(name, []).append(_curve(arm, steps, values))
    return curves


def validation_curves(
    facts: Facts, comparison: Comparison, metrics: Sequence[str]
) -> dict[str, list[Curve]]:
    """Metric -> its curves, of each trial that was evaluated twice or more, also while it runs."""
    curves: dict[str, list[Curve]] = {}
    for metric in metrics:
        for arm in comparison.arms:
            for trial in arm.trials:
                points = facts.trials[trial.trial].histories.get(metric, ())
                # pycocotools says -1 where there was nothing to evaluate.
                points = tuple((step, value) for step, value in points if value >= 0)
                if len(points) > 1:
                    steps, values = [s for s, _ in points], [v for _, v in points]
                    curves.setdefault(metric, []).append(_curve(arm, steps, values))
    return curves


def _curve(arm: Arm, steps: Sequence[float], values: Sequence[float]) -> Curve:
    return Curve(arm_name(arm.arm), arm_label(arm), steps, values)


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
