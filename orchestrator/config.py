"""A study as a person writes it, a submission as the service receives it, and what the service answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from model.config import Record

StudyState = Literal["active", "paused", "done", "failed", "cancelled"]
TrialState = Literal["queued", "starting", "running", "stopping", "done", "failed", "cancelled"]
FINAL_STATES = ("done", "failed", "cancelled")


_LEAST, _MOST = 1e-4, 1e6  # of a resource: Ray's unit, and far more than a rank can use


# --- the study file -------------------------------------------------------------------------------------------------


class Baseline(Record):
    """Where the arms start: a preset or a run file, with dotted overrides. Exactly one of the two is set."""

    preset: str = ""
    file: str = ""
    set: dict[str, Any] = {}


class Resources(Record):
    """What one trial of the study occupies: a gang of `ranks` that starts as a whole or waits."""

    ranks: int = Field(1, ge=1, le=100_000)
    cpus_per_rank: float = Field(1.0, ge=_LEAST, le=_MOST)
    gpus_per_rank: float = Field(0.0, ge=0, le=_MOST)
    custom_per_rank: dict[str, float] = {}  # custom Ray resources
    max_nodes: int = Field(0, ge=0)  # 0: the gang may spread over any number of nodes

    @field_validator("gpus_per_rank")
    @classmethod
    def _countable(cls, value: float) -> float:
        if 0 < value < _LEAST:
            raise ValueError(f"is {value:g}; Ray counts in steps of {_LEAST:g}")
        return value

    @field_validator("custom_per_rank")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory") or not name:
                raise ValueError(f"{name!r} is no custom resource; use cpus_per_rank or gpus_per_rank")
            if not _LEAST <= amount <= _MOST:
                raise ValueError(f"{name} is {amount:g}; give {_LEAST:g} to {_MOST:g}")
        return value


class Study(Record):
    """A baseline, named factors with named levels (each a set of dotted overrides), a design and seeds."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = ""
    baseline: Baseline
    factors: dict[str, dict[str, dict[str, Any]]] = {}  # factor -> level -> dotted path -> value
    design: Literal["grid", "one_at_a_time"] = "grid"
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    resources: Resources = Resources()
    priority: int = Field(0, ge=-100, le=100)
    gpu_hours: float = Field(0.0, ge=0)  # budget of the study; 0 is no limit
    max_parallel: int = Field(0, ge=0)  # trials at once; 0 is no limit
    max_attempts: int = Field(3, ge=1)
    paper_table: str = ""  # key into paper_tables.json, shown beside one's own numbers
    paper_rows: dict[str, str] = {}  # "factor=level,..." -> row of that table
    metrics: tuple[str, ...] = ("bbox/AP", "segm/AP", "segm/AP50", "segm/AP75")  # columns of the report

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and (not value or any(isinstance(seed, bool) for seed in value)):
            raise ValueError("give at least one seed, each a whole number")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("seeds must be distinct and not negative")
        return value


# --- what travels to the service ------------------------------------------------------------------------------------


class TrialPlan(Record):
    """One trial as the submitter's code expanded it. To the service `run` is data."""

    key: str = Field(min_length=1, max_length=300)  # "roi=align,masks=sigmoid/seed-0", unique in its study
    arm: dict[str, str]  # factor -> level
    seed: int
    baseline: bool  # the arm that the others are compared with
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")
    run: dict[str, Any]
    tags: dict[str, str] = {}


class Submission(Record):
    """A study with its trials, checked and expanded by the code that will run them."""

    study: Study
    study_yaml: str = Field(max_length=1_000_000)
    trials: tuple[TrialPlan, ...] = Field(min_length=1)
    code: str = ""  # SHA-256 of the uploaded package; empty runs the code that the service was installed with
    storage: str = ""  # where trial folders go; empty is the service's own
    warnings: tuple[str, ...] = ()  # repeated in the report
    idempotency_key: str = Field("", max_length=200)
    fresh: bool = False  # run trials anew that have a finished result


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
    progress: dict[str, Any] = {}  # workers.config.Progress
    events: list[dict[str, Any]] = []  # workers.config.Event: resumes, rollbacks, preemptions
    attempt_list: list[AttemptView] = []


class StudyView(BaseModel):
    study: str  # id
    name: str
    owner: str
    state: StudyState
    priority: int
    created_at: float
    storage: str
    spec: dict[str, Any]  # orchestrator.config.Study
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
    """A study after a person cancelled, paused, resumed or retried it; `changed`: whether that did anything."""

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

    bytes, cache, evicted (files of other datasets): once it is done; without a cache all was there already.
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


# --- the service ----------------------------------------------------------------------------------------------------


def has_credentials(uri: str) -> bool:
    """Whether `scheme://USER:PASSWORD@host` is what it looks like."""
    return "@" in uri.partition("://")[2].partition("/")[0]


class Limits(Record):
    """What admission never exceeds; 0 is no limit."""

    running: int = Field(0, ge=0)  # trials at once over all users
    running_per_user: int = Field(0, ge=0)
    ageing_s: float = Field(3600.0, gt=0)  # a waiting trial gains one point of priority in this time
    backoff_s: float = Field(30.0, ge=0)  # before the second try of a failed attempt, doubled for each further one
    stall_s: float = Field(1800.0, gt=0)  # an attempt whose step stands still for this long is started again
    lost_without_progress: int = Field(5, ge=1)  # nodes lost in a row without a step gained before a trial is given up


class NodeShape(Record):
    """Nodes that a growing cluster can have: what one of them holds, and how many there may be."""

    resources: dict[str, float] = Field(min_length=1)  # as Ray counts them: {"CPU": 96, "GPU": 8}
    count: int = Field(1, ge=1)


class ServiceSettings(Record):
    """One service: where it listens, what it remembers in, and what it drives."""

    host: str = "127.0.0.1"
    port: int = Field(8750, ge=0, le=65535)  # 0 takes a free one
    home: str = Field(min_length=1)  # folder of the service's own files: token, logs, local Ray head and MLflow
    ledger: str = ""  # SQLAlchemy URL; empty is SQLite under `home`
    storage: str = ""  # folder or pyarrow.fs URI for trial folders; empty is `home`/studies
    ray: str = "local"  # URL of a Ray dashboard, or "local" for a head of its own
    ray_token_file: str = ""  # of a cluster that is not "local"; without it RAY_AUTH_TOKEN counts
    autoscale: bool = False  # the cluster grows on request: what the head of the queue lacks is asked for
    node_shapes: tuple[NodeShape, ...] = ()  # what it can grow to; without them no study is refused for its size
    ray_cpus: int = Field(0, ge=0)  # of the local head; 0 is what the machine has
    ray_gpus: int = Field(-1, ge=-1)  # of the local head; -1 lets Ray look
    ray_memory_mib: int = Field(256, ge=80)  # object store of the local head; trials pass next to nothing through it
    ray_resources: dict[str, float] = {}  # custom resources of the local head
    mlflow: str = "local"  # URI of a tracking server, "local" for one of its own, empty for none
    mlflow_public: str = ""  # the same server as a person's browser opens it
    mlflow_wait_s: float = Field(90.0, ge=0)  # a study starts without its parent run after this long
    token_file: str = ""  # the first administrator's token, made with mode 0600 if absent; empty is `home`/token
    idle_minutes: float = Field(0.0, ge=0)  # ends itself after this long with nothing to do and no client; 0 never
    roots: tuple[str, ...] = ()  # folders and URIs that studies may name; empty allows every path
    entry: tuple[str, ...] = ("python", "-m", "workers.ray_entry")  # `--spec FILE` is appended
    environment: dict[str, str] = {}  # of every trial's processes
    grace_s: float = Field(60.0, gt=0)  # from asking a trial to stop to ending it by force
    poll_s: float = Field(1.0, gt=0)
    max_code_mib: int = Field(64, ge=1)
    webhook: str = ""  # receives a JSON POST when a study ends
    limits: Limits = Limits()

    @field_validator("storage", "mlflow", "mlflow_public", "roots")
    @classmethod
    def _without_credentials(cls, value: Any) -> Any:
        for uri in value if isinstance(value, tuple) else (value,):
            if has_credentials(uri):
                raise ValueError(
                    "holds credentials, and every user may read it; use the environment "
                    "(AWS_..., MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
                )
        return value
