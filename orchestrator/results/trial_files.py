"""What a trial left in its folder, as far as a report needs it.

The code of the study wrote these files, which may be of another version than this one: unknown
fields are ignored, missing ones have their defaults, and a file of another form counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import AliasPath, Field, ValidationError

from contract.answers import TrialView
from contract.attempt import RESULT_FILE, SPEC_FILE
from contract.record import Message
from orchestrator.settings import service_files


class SeenRun(Message):
    """Of a `contract.recipe.RunConfig` what a report needs; 0 and "" are not known."""

    steps: int = Field(0, validation_alias=AliasPath("loop", "steps"))
    global_batch: int = Field(0, validation_alias=AliasPath("loop", "global_batch"))
    precision: str = Field("", validation_alias=AliasPath("loop", "precision"))
    short_side_px: int = Field(0, validation_alias=AliasPath("model", "image", "short_side_px"))

    @property
    def images(self) -> int:
        """Training images of the whole run, repetitions counted; 0 if the run is not known."""
        return self.steps * self.global_batch


class SeenSpec(Message):
    """A `contract.attempt.RunSpec`."""

    run: SeenRun | None = None
    tags: dict[str, str] = {}


class SeenResult(Message):
    """A `contract.attempt.Result`."""

    attempt: int = 0
    artifacts: dict[str, str] = {}  # name -> path relative to the trial's folder
    weights_sha256: str = ""
    precision: str = ""  # empty in a result of an older version


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


def _read(folder: str, name: str) -> Mapping[str, Any]:
    """Empty if the trial has no folder, or the file is not there, or half-written."""
    return (service_files(folder).read_object(name) or {}) if folder else {}
