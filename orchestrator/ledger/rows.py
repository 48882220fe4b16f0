"""What the ledger's queries return: frozen records, one class for each set of columns.

A field `NAME_json` holds the JSON of the column `NAME` as it is stored; a property beside it gives
the same as a record. The JSON itself stays untouched, because another version may have written
fields that this one does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from contract.attempt import AttemptState, Progress, Wish
from contract.study import Baseline, Resources, Study, StudyState, TrialState

OPEN_STUDY: tuple[StudyState, ...] = ("active", "paused")  # the states of a study that is not over
Json: TypeAlias = dict[str, Any]  # an object of a JSON column: not checked yet


@dataclass(frozen=True)
class StudyBrief:
    """What the queue and the loop need of a study: ten thousand trials share one such object."""

    id: str
    name: str
    owner: str
    state: StudyState
    priority: int
    created_at: float
    code: str
    spec_json: Json
    fresh: bool
    mlflow_experiment: str
    mlflow_run_id: str

    @cached_property
    def spec(self) -> Study:
        """A field that this version does not know is left out, a missing one is its default.

        A specification that this version would refuse comes as it was written; `spec_problem` says
        why.
        """
        known = _known(Study, self.spec_json)
        try:
            return Study.model_validate(known)
        except ValidationError:
            # Somebody must still see such a study in the queue and cancel it: so it is read without
            # checks.
            nested = {
                "baseline": Baseline.model_construct(**_known(Baseline, known.get("baseline", {}))),
                "resources": Resources.model_construct(**self._resources()),
            }
            return Study.model_construct(**{**known, **nested})

    @property
    def spec_problem(self) -> str:
        """What is wrong with the study's resources, in one line; empty if nothing is."""
        try:
            Resources.model_validate(self._resources())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            return f"resources.{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return ""

    def _resources(self) -> Json:
        return _known(Resources, self.spec_json.get("resources", {}))


@dataclass(frozen=True)
class StudyRow(StudyBrief):
    ended_at: float
    storage: str
    study_yaml: str
    warnings: list[str]
    idempotency_key: str | None  # None if the submission has none
    mlflow_closed: bool
    webhook_sent: bool
    looks: list[Json]
    verdicts: list[Json]
    judged: bool


def _known(record: type[BaseModel], data: Mapping[str, Any]) -> Json:
    """The fields that `record` has; of the records in it likewise."""
    known = {name: value for name, value in data.items() if name in record.model_fields}
    for name, value in known.items():
        inner = record.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            known[name] = _known(inner, value)
    return known


@dataclass(frozen=True)
class TrialBrief:
    """A trial without its run and tags, which are most of its bytes."""

    id: str
    study: str
    position: int
    key: str
    arm: dict[str, str]
    seed: int
    baseline: bool
    identity: str
    training: str
    state: TrialState
    queued_at: float
    not_before: float  # the end of a backoff
    wish: Wish
    attempts: int
    failures: int
    lost: int
    best_step: int
    metrics: dict[str, float]
    error: str
    error_class: str  # an ErrorClass; "budget" if its study used that up, "" without an error
    folder: str
    cached_from: str  # the trial whose result it took
    mlflow_run_id: str
    mlflow_closed: bool
    progress_json: Json
    moved_at: float
    marks: list[Json]
    rank_seconds: float
    suspects: str  # nodes that its next attempt avoids, separated by blanks

    @cached_property
    def progress(self) -> Progress | None:
        """The last `progress.json` that the loop read; None before the first one."""
        try:
            return Progress.model_validate(self.progress_json) if self.progress_json else None
        except ValidationError:  # another version wrote it; the next progress.json replaces it
            return None


@dataclass(frozen=True)
class TrialRow(TrialBrief):
    run: Json
    tags: dict[str, str]


@dataclass(frozen=True)
class QueuedTrial:
    """A trial that is not over, as admission and the queue need it: few columns of many rows."""

    study: StudyBrief
    id: str
    position: int
    key: str
    identity: str
    training: str
    state: TrialState
    queued_at: float
    not_before: float
    wish: Wish
    suspects: str


@dataclass(frozen=True)
class AttemptRow:
    trial: str
    number: int
    submission_id: str
    state: AttemptState
    cause: str
    started_at: float
    running_at: float
    stop_asked_at: float
    ended_at: float
    step: int
    first_step: int
    avoid: str  # nodes that it was kept off, separated by blanks


@dataclass(frozen=True)
class LiveAttempt:
    """An attempt that Ray may be working on, with its trial and study."""

    attempt: AttemptRow
    trial: TrialBrief
    study: StudyBrief


@dataclass(frozen=True)
class EventRow:
    id: int
    at: float
    study: str
    trial: str
    attempt: int
    kind: str
    cause: str
