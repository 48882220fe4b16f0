"""What the service takes and what it answers over HTTP: one record for each JSON object.

A field's name is the key on the wire, and the order of the fields is the order of the keys. Answers
are messages: a client that is older than the service ignores the fields that it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from contract.attempt import AttemptState, Event, Progress
from contract.record import Message
from contract.study import StudyState, TrialState

Role: TypeAlias = Literal["read", "submit", "admin"]
StudyAction: TypeAlias = Literal["cancel", "pause", "resume", "retry"]
TrialAction: TypeAlias = Literal["cancel", "retry"]


# --- bodies of requests ---------------------------------------------------------------------------


class Priority(BaseModel):
    """The place of a study in the queue; the larger number goes first."""

    priority: int = Field(ge=-100, le=100)


class Retention(BaseModel):
    """Which checkpoints may go. Without `apply` the service only lists them."""

    checkpoints_days: float = Field(30.0, ge=0, le=36500)  # since the end of their study
    apply: bool = False


# The nodes fetch these with their own credentials. A local path would mean another file on each
# node, and a NUL character fits neither a command line nor PostgreSQL.
RemoteUri: TypeAlias = Annotated[str, Field(max_length=2000, pattern=r"^(s3|gs|gcs)://[^\x00]+$")]


class StageRequest(BaseModel):
    """The datasets of one study; the cache must hold all of them at once."""

    uris: tuple[RemoteUri, ...] = Field(min_length=1, max_length=100)
    cache_gib: float = Field(20.0, ge=0.001, le=1e6)


class NewUser(BaseModel):
    role: Role


# --- studies and trials ---------------------------------------------------------------------------


class Submitted(Message):
    study: str  # id
    created: bool  # False: the idempotency key named a study that exists already
    trials: int


class AttemptView(Message):
    number: int
    state: AttemptState
    submission_id: str
    cause: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    step: int = 0


def _none_if_empty(value: object) -> object:
    return value or None


def _empty_if_none(value: Progress | None) -> dict[str, Any]:
    return value.model_dump() if value is not None else {}


# The ledger and the wire say {} before the first step; the code says None.
LastProgress: TypeAlias = Annotated[
    Progress | None, BeforeValidator(_none_if_empty), PlainSerializer(_empty_if_none)
]


class Accepted(Message):
    """A study that the service would take."""

    trials: int


class TrialView(Message):
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
    why: str = ""  # why the trial waits, or what MLflow lacks of one that is over, in words
    cached_from: str = ""  # the trial that has the result
    cached_name: str = ""  # the same as people know it, STUDY:KEY
    ran_by: str = ""  # whose trial made the result; empty where that study was forgotten
    identity: str = ""
    storage: str = ""
    mlflow_run_id: str = ""
    progress: LastProgress = None
    events: list[Event] = []  # resumes, rollbacks, preemptions
    attempt_list: list[AttemptView] = []


class LookTaken(Message):
    """A look at a study's contrasts. seeds: the number that it was planned for."""

    seeds: int
    at: float
    numbers: dict[str, int]  # arm -> its seeds with a result
    tested: list[str]  # contrasts
    closed: list[str] = []  # those of them that no later look tests
    stopped: dict[str, str] = {}  # arm -> why it takes no more seeds


class Standing(Message):
    """The first verdict on a contrast. It stands, whatever seeds come later."""

    name: str
    metric: str
    weights: dict[str, float]
    difference: float
    low: float
    high: float
    resolvable: float | None = None
    quantile: float | None = None  # half of the interval is this many standard errors
    df: float = 0.0  # 0 is not known
    seeds: int  # of the arm that has the fewest
    verdict: str
    trials: dict[str, list[str]]  # arm -> the identities of the trials that it rests on
    study: str  # that gave it
    at: float


class StudyView(Message):
    study: str  # id
    name: str
    owner: str
    state: StudyState
    priority: int
    created_at: float
    storage: str
    # A contract.study.Study as it was submitted. Not parsed here: a study that an older version
    # accepted must stay visible when today's record refuses it.
    spec: dict[str, Any]
    warnings: list[str] = []
    mlflow_experiment: str = ""
    mlflow_run_id: str = ""  # of the study's own run
    mlflow_experiment_id: str = ""  # MLflow's own; only of a study that is asked for by its id
    counts: dict[str, int] = {}  # trials by state
    looks: list[LookTaken] = []
    verdicts: list[Standing] = []
    trials: list[TrialView] = []


class StudyList(Message):
    studies: list[StudyView]


class ChangedStudy(StudyView):
    """A study after a person cancelled, paused, resumed or retried it."""

    changed: bool  # False: there was nothing to change


class ChangedTrial(Message):
    trial: str
    action: TrialAction
    changed: bool  # False: there was nothing to change


class Forgotten(Message):
    """What `forget` keeps, or has deleted, of a study. borrowers: trials with results of it."""

    study: str
    forgotten: bool = True
    folder: str = ""
    bytes: int = 0  # below `folder`
    whole: bool = True  # False: `folder` has more files than were counted
    deleted: bool = False  # the folder, with --files
    borrowers: list[str] = []  # of other studies, as STUDY:KEY


class PageLink(Message):
    """Where a browser sees a study's page without a token. path: below the service's address."""

    path: str
    expires: int  # Unix time


class Finished(Message):
    finished: dict[str, str]  # identity -> the trial that has its result


class CodeKept(Message):
    code: str  # SHA-256 of the package
    bytes: int


# --- queue, events, logs --------------------------------------------------------------------------


class QueueEntry(Message):
    trial: str
    key: str
    study: str
    study_name: str
    owner: str
    state: TrialState
    priority: int
    position: int  # 1 starts next; 0 for a trial that runs
    needs: str  # "2 ranks x 1 CPU"
    why: str


class QueueView(Message):
    running: list[QueueEntry]
    queue: list[QueueEntry]


class EventView(Message):
    id: int
    at: float
    study: str
    trial: str = ""
    attempt: int = 0
    kind: str
    cause: str


class EventPage(Message):
    events: list[EventView]
    next: int  # the last id; the next request asks for what comes after it


class LogPage(Message):
    text: str
    next: int  # the offset to ask for next
    done: bool  # the attempt is over: nothing will be added
    attempt: int
    rank: int


# --- the service and its cluster ------------------------------------------------------------------


class Health(Message):
    """Without a token, so it says no more than whether the service works."""

    ok: bool = True  # False comes with the status 503
    version: str
    loop_s: float = 0.0  # since the loop ended a turn
    ledger_s: float = 0.0  # since the ledger took a write
    problems: list[str] = []  # why it is not `ok`


class NodeView(Message):
    id: str
    total: dict[str, float]
    free: dict[str, float]


class ClusterView(Message):
    state: str  # in words: "ready", "the cluster is starting", ...
    nodes: list[NodeView]


class Info(Message):
    version: str
    mlflow_uri: str  # as a browser on this machine opens it; empty without tracking
    has_mlflow: bool = True  # without it `mlflow_uri` stays empty; an older service says nothing
    storage: str
    cluster: ClusterView
    user: str
    role: Role


class UserView(Message):
    name: str
    role: Role
    created_at: float


class UserList(Message):
    users: list[UserView]


class NewToken(Message):
    """The token is shown this once: the ledger keeps its hash alone."""

    user: str
    role: Role
    token: str


class UserRemoved(Message):
    user: str
    removed: bool = True


class RemovalView(Message):
    """A folder of checkpoints that a retention policy lets go, or of a forgotten study."""

    model_config = ConfigDict(from_attributes=True)

    study: str
    trial: str  # empty for the folder of a whole study
    folder: str
    bytes: int


class Collected(Message):
    removals: list[RemovalView]
    applied: bool
    freed_bytes: int


class Check(Message):
    """One line of `maskray doctor`. `remedy` is empty where the check passes."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


class Checks(Message):
    checks: list[Check]


class StagedNode(Message):
    """What `maskray data stage` did on one node. done, total: files.

    bytes, cache, evicted (files of other datasets): known once the node is done.
    An empty cache says that the dataset was there already.
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


class Staging(Message):
    staging: str  # id
    nodes: list[StagedNode]


class Ending(Message):
    ending: bool = True


class Refusal(Message):
    """The body of every answer that is no success."""

    detail: str  # one line
