"""Curves and pictures that trials left in their folders."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from contract.answers import TrialView
from contract.words import one_line
from orchestrator.results.cells import arm_label
from orchestrator.results.comparison import Arm, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.plots.curves import Curve
from orchestrator.study.contrasts import arm_name
from orchestrator.trial_folder import TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")
# The page holds everything in one file that people mail to each other.
MAX_ARTIFACT_BYTES = 64 * 2**20  # a series of a million steps has 20 MB
MAX_PICTURE_BYTES = 4 * 2**20
MAX_PICTURES = 12
MAX_CURVES = 60
MAX_CURVE_ROWS = 5_000_000
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
    from pyarrow import ArrowException  # heavy: a text table does without it

    curves: dict[str, list[Curve]] = {}
    trials = [(arm, trial) for arm in comparison.arms for trial in arm.trials]
    count = 0
    for arm, trial in trials:
        raw = artifact(facts, trial, "series") if count < MAX_CURVES else None
        if raw is None:
            continue  # a trial that has not ended has no series
        try:
            steps, losses = _series(raw)
        except (ArrowException, ValueError) as error:
            LOG.warning("trial %s: its series cannot be read (%s)", trial.key, one_line(error))
            continue
        count += bool(losses)
        for name, values in losses.items():
            curves.setdefault(name, []).append(_curve(arm, steps, values))
    return curves


def _series(raw: bytes) -> tuple[list[float], dict[str, list[float]]]:
    """The steps of a Parquet file, and the values of each loss in it."""
    import pyarrow as pa
    from pyarrow import parquet

    file = parquet.ParquetFile(io.BytesIO(raw))
    if file.metadata.num_rows > MAX_CURVE_ROWS:  # a small file can unpack to any number
        raise ValueError(f"{file.metadata.num_rows} rows, more than {MAX_CURVE_ROWS}")
    there = file.schema_arrow.names
    names = sorted(name for name in there if name == "loss" or name.startswith("loss/"))
    if "step" not in there or not names:
        return [], {}
    table = file.read(columns=["step", *names])
    # a loss that began later is null in the parts before it
    columns = {
        name: table.column(name).cast(pa.float64()).fill_null(math.nan).to_pylist()
        for name in ("step", *names)
    }
    return columns.pop("step"), columns


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
        raw = artifact(facts, trial, "picture/last")
        # By its bytes, not by its name: an SVG, for one, could hold a script.
        if raw is not None and len(raw) <= MAX_PICTURE_BYTES and raw.startswith((_PNG, _JPEG)):
            kind = "image/png" if raw.startswith(_PNG) else "image/jpeg"
            return Picture(trial.key, kind, raw)
    return None


def artifact(facts: Facts, trial: TrialView, name: str) -> bytes | None:
    """The bytes of a trial's artifact; None where there is none."""
    path = facts.trials[trial.trial].result.artifacts.get(name, "")
    if not path:
        return None
    try:
        return TrialFolder(trial.storage).read(path, MAX_ARTIFACT_BYTES)
    except TrialFileError as error:  # one odd file must not cost a whole study its report
        LOG.warning("%s", error)
        return None
