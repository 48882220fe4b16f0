"""What the service tells the ranks of one attempt, and what they leave behind."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from contract.recipe import RunConfig
from contract.record import Record

AttemptState: TypeAlias = Literal[
    "submitting", "submitted", "running", "done", "failed", "stopped", "lost"
]

# Why a trial is asked to stop; empty: nobody asks.
Wish: TypeAlias = Literal["", "cancel", "pause", "stall", "budget"]

ErrorClass: TypeAlias = Literal[
    "none", "person", "out_of_memory", "node", "collective", "diverged", "unknown"
]

# Exit statuses of `python -m workers.train` and `python -m workers.ray_entry`, read by the orchestrator.
(
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_PREEMPTED,
    EXIT_STOPPED,
    EXIT_DIVERGED,
    EXIT_OUT_OF_MEMORY,
) = (
    0,
    1,
    2,
    75,
    76,
    77,
    78,
)

# Files of a trial's folder, relative to RunSpec.storage.
SPEC_FILE = "attempts/{attempt}/spec.json"

NODES_FILE = "attempts/{attempt}/nodes.json"  # ids of the Ray nodes that the ranks sit on, by rank

OUTCOME_FILE = "attempts/{attempt}/outcome.json"

LOG_FILE = "attempts/{attempt}/rank-{rank}.log"

PROGRESS_FILE = "progress.json"

SPOOL_RECORDS = "spool/records.jsonl"  # what the tracker is told, in order

SPOOL_CURSOR = "spool/cursor.json"  # {"bytes": how much of it the tracker has}

RESULT_FILE = "result.json"

CHECKPOINT_FOLDER = "checkpoints"

ARTIFACT_FOLDER = "artifacts"  # config, detections, pictures, weights, metric series

STOP_FILE = "stop"  # its presence asks all ranks to checkpoint and end


class NoTracking(Record):
    kind: Literal["none"] = "none"


class MLflowTracking(Record):
    """The trial's run is found by its tag `maskray.trial` before it is created."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str
    experiment: str
    parent_run_id: str = ""  # empty: the run stands alone
    step_metrics_every: int = Field(50, ge=1)  # steps averaged into one point


Tracking: TypeAlias = Annotated[NoTracking | MLflowTracking, Field(discriminator="kind")]


class RunSpec(Record):
    """One attempt of one trial, as the orchestrator hands it to `python -m workers.ray_entry --spec FILE`."""

    run: RunConfig
    storage: str = Field(min_length=1)  # the trial's own folder: a path or a pyarrow.fs URI
    study: str = "local"
    trial: str = "trial"
    name: str = "run"  # for people: "roi=align,masks=sigmoid/seed-0"
    arm: dict[str, str] = {}
    attempt: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1)
    cpus_per_rank: float = Field(1.0, gt=0)
    gpus_per_rank: float = Field(0.0, ge=0)
    rank_resources: dict[str, float] = {}  # custom Ray resources per rank
    max_nodes: int = Field(
        0, ge=0
    )  # 1 keeps the gang together; above that Ray packs it as tightly as it can
    avoid_nodes: tuple[str, ...] = ()  # ids of Ray nodes that no rank may sit on
    tracking: Tracking = NoTracking()
    tags: dict[str, str] = {}  # to MLflow as they are: code version, manifest hash, owner
    study_yaml: str = ""  # artifact of the run
    cache: str = ""  # node-local folder for remote shards; empty uses the system's temporary folder
    grace_s: float = Field(60.0, gt=0)  # from a stop request to the last checkpoint


class Progress(BaseModel):
    """`progress.json`, replaced by rank 0 at every logging interval."""

    attempt: int
    step: int
    steps: int
    phase: Literal["starting", "training", "evaluating", "finishing"]
    loss: float | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    updated_at: float  # Unix time


class Event(BaseModel):
    """Something that marks a trial in every table: a resume, a rollback, a preemption."""

    at: float
    kind: str
    step: int
    text: str


class Outcome(BaseModel):
    """How one attempt ended, as its rank 0 or its driver saw it."""

    state: Literal["done", "failed", "stopped", "preempted"]
    error_class: ErrorClass = "none"
    error: str = ""  # one line with the remedy
    step: int = 0
    events: list[Event] = []


class Result(BaseModel):
    """`result.json` of a finished trial. Metric names: `bbox/AP`, `segm/AP75`, `segm-argmax/AP`, `images_per_s`, ..."""

    metrics: dict[str, float]  # AP as fractions, -1 where nothing was there to evaluate
    per_class: dict[str, dict[str, float]] = {}  # "segm/AP" -> category -> value
    step: int
    attempt: int
    world_size: int
    weights_sha256: str  # of the last weights
    artifacts: dict[
        str, str
    ] = {}  # "detections/bbox", "picture/last", ... -> path relative to the trial's folder
    mlflow_run_id: str = ""
    events: list[Event] = []
