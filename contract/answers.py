"""What the service answers over HTTP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from contract.study import StudyState, TrialState


class AttemptView(BaseModel):
    number: int
    state: str
    submission_id: str
    cause: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    step: int = 0


class TrialView(BaseModel):
    trial: str  # id, also the name of its folder
    key: str
    study: str
    arm: dict[str, str]
    seed: int
    baseline: bool
    state: TrialState
    attempts: int
    metrics: dict[str, float] = {}
    error: str = ""
    error_class: str = ""
    why: str = ""  # why it waits, in words
    cached_from: str = ""
    identity: str = ""
    storage: str = ""
    mlflow_run_id: str = ""
    progress: dict[str, Any] = {}  # contract.attempt.Progress
    events: list[dict[str, Any]] = []  # contract.attempt.Event: resumes, rollbacks, preemptions
    attempt_list: list[AttemptView] = []


class StudyView(BaseModel):
    study: str  # id
    name: str
    owner: str
    state: StudyState
    priority: int
    created_at: float
    storage: str
    spec: dict[str, Any]  # contract.study.Study
    warnings: list[str] = []
    mlflow_experiment: str = ""
    counts: dict[str, int] = {}  # trials by state
    trials: list[TrialView] = []


class EventView(BaseModel):
    id: int
    at: float
    study: str
    trial: str = ""
    attempt: int = 0
    kind: str
    cause: str


class ActedView(StudyView):
    """A study after a person cancelled, paused, resumed or retried it.

    changed: whether that did anything.
    """

    changed: bool


class QueueEntry(BaseModel):
    trial: str
    key: str
    study: str
    study_name: str
    owner: str
    state: TrialState
    priority: int
    position: int  # 1 starts next; 0 for what is running
    needs: str  # "2 ranks x 1 CPU"
    why: str


class Info(BaseModel):
    version: str
    mlflow_uri: str  # as a browser on this machine opens it; empty without tracking
    storage: str
    cluster: dict[str, Any]  # nodes with their total and free resources
    user: str
    role: Literal["read", "submit", "admin"]


class Check(BaseModel):
    """One line of `maskray doctor`. `remedy` is empty where it passes."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class StagedNode(BaseModel):
    """What `maskray data stage` did on one node. done, total: files.

    bytes, cache, evicted (files of other datasets): known once it is done. Without a cache all
    files were there already.
    """

    node: str  # Ray's id, empty for this machine
    address: str
    state: Literal["running", "done", "failed"]
    done: int = 0
    total: int = 0
    bytes: int = 0
    cache: str = ""
    evicted: int = 0
    error: str = ""


class Staging(BaseModel):
    staging: str  # id
    nodes: list[StagedNode]


class QueueView(BaseModel):
    running: list[QueueEntry]
    queue: list[QueueEntry]


class LogPage(BaseModel):
    text: str
    next: int  # the offset to ask for next
    done: bool  # the attempt is over: nothing will be added
    attempt: int
    rank: int


class EventPage(BaseModel):
    events: list[EventView]
    next: int
