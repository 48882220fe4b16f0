"""What a trial left in its folder, as far as a report needs it.

The code of the study wrote these files, which may be of another version than this one: unknown
fields are ignored, missing ones have their defaults, and a file of another form counts as missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import AliasPath, Field, JsonValue, ValidationError

from contract.answers import TrialView
from contract.attempt import RESULT_FILE, SPEC_FILE, SPOOL_RECORDS
from contract.recipe import steps_between_evaluations
from contract.record import Message
from orchestrator.trial_folder import ANSWER_BYTES, TrialFileError, TrialFolder, sound

LOG = logging.getLogger("maskray")


class SeenRun(Message):
    """Of a `contract.recipe.RunConfig` what a report needs; 0 and "" are not known."""

    steps: int = Field(0, validation_alias=AliasPath("loop", "steps"))
    global_batch: int = Field(0, validation_alias=AliasPath("loop", "global_batch"))
    precision: str = Field("", validation_alias=AliasPath("loop", "precision"))
    eval_every: int = Field(0, validation_alias=AliasPath("loop", "eval_every_steps"))
    train: str = Field("", validation_alias=AliasPath("data", "train"))
    val: str = Field("", validation_alias=AliasPath("data", "val"))

    @property
    def eval_every_steps(self) -> int:
        """0 is at the end alone, or not known."""
        return steps_between_evaluations(self.eval_every, self.steps)

    @property
    def images(self) -> int:
        """Training images of the whole run, repetitions counted; 0 if the run is not known."""
        return self.steps * self.global_batch


class SeenSpec(Message):
    """A `contract.attempt.RunSpec`."""

    run: SeenRun | None = None
    record: dict[str, Any] = Field(
        {}, validation_alias=AliasPath("run")
    )  # the run as it was written
    tags: dict[str, str] = {}


class SeenResult(Message):
    """A `contract.attempt.Result`."""

    attempt: int = 0
    step: int = 0
    per_class: dict[str, dict[str, float]] = {}  # "segm/AP" -> category -> value
    artifacts: dict[str, str] = {}  # name -> path relative to the trial's folder
    weights_sha256: str = ""
    precision: str = ""  # empty in a result of an older version
    kernels: str = ""
    platform: str = ""


class _SeenRecord(Message):
    """A line of the spool, as far as it is a metric at a step or goes back to one."""

    kind: str = ""
    step: int = 0
    values: dict[str, float] = {}


_MAX_SPOOL_BYTES = 64 * 2**20  # of a run of a day; a report must not load more for one curve

_Seen = TypeVar("_Seen", bound=Message)


def seen(record: type[_Seen], data: Any) -> _Seen:
    """`data` as far as `record` knows it; the record's defaults where it has another form."""
    try:
        return record.model_validate(data, from_attributes=True)
    except ValidationError:
        return record()  # one odd file must not cost a whole study its report


def read_result(trial: TrialView) -> SeenResult:
    """The trial's `result.json`. Raises OSError if its storage cannot be read at all."""
    return seen(SeenResult, _read(trial.storage, RESULT_FILE))


def read_spec(trial: TrialView, result: SeenResult) -> SeenSpec:
    """The spec of the attempt that made `result`, or of the last one. Raises OSError likewise."""
    # A trial that goes on has no result yet; its last attempt has the same run as the others.
    attempt = result.attempt or max(trial.attempts, 1)
    return seen(SeenSpec, _read(trial.storage, SPEC_FILE.format(attempt=attempt)))


def read_histories(
    trial: TrialView, metrics: Sequence[str]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """(step, value) of each evaluation of the run, as far as its spool is there and readable."""
    values: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    try:
        folder = TrialFolder(trial.storage) if trial.storage else None
        data = folder.read(SPOOL_RECORDS, _MAX_SPOOL_BYTES) if folder is not None else None
    except TrialFileError as error:
        LOG.warning("%s; its curve is left out", error)
        data = None
    for line in (data or b"").splitlines():
        try:
            record = seen(_SeenRecord, sound(json.loads(line)))
        except (ValueError, RecursionError):
            continue  # the last line of a run that was killed
        for metric, points in values.items():
            if record.kind == "rewind":
                values[metric] = {s: v for s, v in points.items() if s <= record.step}
            elif metric in record.values:
                points[record.step] = record.values[metric]
    return {metric: tuple(sorted(points.items())) for metric, points in values.items()}


def _read(folder: str, name: str) -> Mapping[str, JsonValue]:
    """Empty if the trial has no folder, or the file is not there, or none of ours."""
    if not folder:
        return {}
    try:
        value = TrialFolder(folder).json(name, ANSWER_BYTES)
    except TrialFileError as error:
        LOG.warning("%s; counts as missing", error)
        return {}
    return value if isinstance(value, dict) else {}
