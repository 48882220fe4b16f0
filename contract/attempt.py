"""What the service tells a program on a node, and what the program leaves behind or answers."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, Field

from contract.recipe import RunConfig
from contract.record import Message, Record

# --- words that all rooms use -----------------------------------------------------------------

OutcomeState: TypeAlias = Literal["done", "failed", "stopped", "preempted"]
ErrorClass: TypeAlias = Literal[
    "none", "person", "out_of_memory", "node", "collective", "diverged", "unknown"
]
Phase: TypeAlias = Literal["starting", "training", "evaluating", "finishing"]
AttemptState: TypeAlias = Literal[
    "submitting", "submitted", "running", "done", "failed", "stopped", "lost"
]
LiveAttemptState: TypeAlias = Literal["submitting", "submitted", "running"]
LIVE_ATTEMPTS: tuple[LiveAttemptState, ...] = get_args(LiveAttemptState)  # Ray may work on these
# Of a trial. The ledger keeps such numbers in an SQL integer of 32 bits.
Step: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
# Why a trial is asked to stop. A person wishes the first two, the service the others.
Wish: TypeAlias = Literal["", "cancel", "pause", "stall", "budget"]


class ExitStatus(IntEnum):
    """How `python -m workers.train` and `python -m workers.ray_entry` end; the service reads it.

    Small numbers and those from 128 on mean something to shells and to Ray, hence 75 to 78.
    """

    DONE = 0
    FAILED = 1
    INPUT = 2
    PREEMPTED = 75
    STOPPED = 76
    DIVERGED = 77
    OUT_OF_MEMORY = 78


# --- files of a trial's folder, relative to RunSpec.storage ------------------------------------

SPEC_FILE = "attempts/{attempt}/spec.json"
NODES_FILE = "attempts/{attempt}/nodes.json"  # ids of the Ray nodes that the ranks sit on, by rank
OUTCOME_FILE = "attempts/{attempt}/outcome.json"
CAUSE_FILE = "attempts/{attempt}/rank-{rank}.cause.json"  # why one rank ended badly
LOG_FILE = "attempts/{attempt}/rank-{rank}.log"
DRIVER_LOG = "attempts/{attempt}/driver.log"
# The driver writes these two when it is asked itself; the ranks look for them.
ATTEMPT_STOP_FILE, PREEMPT_FILE = "attempts/{attempt}/stop", "attempts/{attempt}/preempt"
PROGRESS_FILE = "progress.json"
SPOOL_RECORDS = "spool/records.jsonl"  # what the tracker is told, in order
SPOOL_CURSOR = "spool/cursor.json"  # {"bytes": how much of it the tracker has}
SPOOL_LATER = "spool/later-"  # begins the name of a file for each artifact that its store refused
RESULT_FILE = "result.json"
CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_NAME = "{attempt:04d}-{step:08d}"  # of a folder in it
CHECKPOINT_MARKER = "complete.json"  # the last file of a checkpoint
ARTIFACT_FOLDER = "artifacts"  # config, detections, pictures, weights, metric series
CONFIG_FILE = f"{ARTIFACT_FOLDER}/config.yaml"
CATEGORIES_FILE = f"{ARTIFACT_FOLDER}/categories.json"  # COCO's records, in the order of labels
LAST_WEIGHTS = f"{ARTIFACT_FOLDER}/weights-last.safetensors"  # there once the last step is done
BEST_WEIGHTS = f"{ARTIFACT_FOLDER}/weights-best.safetensors"
STOP_FILE = "stop"  # its presence asks all ranks to write a checkpoint and end


# --- what the service tells -------------------------------------------------------------------


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


class AttemptSpec(Record):
    """What the service itself knows of an attempt.

    The package of another version may read it, and refuses a field that it does not know. So the
    service writes no field that is at its default.
    """

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
    # 1 keeps the gang together; above that Ray packs it as tightly as it can
    max_nodes: int = Field(0, ge=0)
    avoid_nodes: tuple[str, ...] = ()  # ids of Ray nodes that no rank may sit on
    tracking: Tracking = NoTracking()
    tags: dict[str, str] = {}  # to MLflow as they are: code version, manifest hash, owner
    study_yaml: str = ""  # artifact of the run
    cache: str = ""  # node-local folder for remote shards; empty uses the system's temporary folder
    trained: str = ""  # folder of a trial with the same training, whose last checkpoint serves
    grace_s: float = Field(60.0, gt=0)  # from a stop request to the last checkpoint


class RunSpec(AttemptSpec):
    """One attempt of one trial. `python -m workers.ray_entry --spec FILE` reads it.

    The service passes `run` on as it came: the study's own code wrote it and checks it.
    """

    run: RunConfig


# --- what the ranks leave behind --------------------------------------------------------------


class Progress(Message):
    """`progress.json`, replaced by rank 0 at every logging interval."""

    attempt: int
    step: Step
    steps: Step
    phase: Phase
    loss: float | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    updated_at: float  # Unix time


class Event(Message):
    """Something that marks a trial in every table: a resume, a rollback, a preemption."""

    at: float
    kind: str
    step: Step
    text: str


class Outcome(Message):
    """How one attempt ended. Its rank 0 or its driver writes it."""

    state: OutcomeState
    error_class: ErrorClass = "none"
    error: str = ""  # one line with the remedy
    rank: int = -1  # whose error it is; -1 where that is unknown
    avoid_node: bool = False  # its GPU broke: the next attempt keeps off the node of `rank`
    step: Step = 0
    events: list[Event] = []


# What an evaluation matched, as a file of numpy arrays: the name of the artifact by kind of result.
# `category`, `image`: of each detection, as places in `objects`; by category, and in it from the
# best score on. `matched`, `ignored`: a bit for each IoU threshold. `objects`: those that count, by
# category and image. `image_ids`: ascending.
MATCHES = "matches/{kind}"
MAX_IMAGES_OF_MATCHES = 2_000  # of a validation set; a larger one has little noise, and large files


class Result(Message):
    """`result.json` of a finished trial.

    Metrics are named as in `contract.metrics` (`bbox/AP`, `segm-argmax/AP75`), and `images_per_s`.
    """

    # AP as fractions, -1 where nothing was there to evaluate. The ledger keeps them all.
    metrics: dict[Annotated[str, Field(max_length=200)], float] = Field(max_length=5000)
    per_class: dict[str, dict[str, float]] = {}  # "segm/AP" -> category -> value
    step: Step
    attempt: int
    world_size: int
    weights_sha256: str  # of the last weights
    kernels: str = ""  # what computed: "torch", or "compiled" and the checksum of native.c
    precision: str = ""  # in which they computed: "bf16", "fp32 (convolutions in TF32)"
    # What moves the last bits: torch's version, the CPU's instructions, the threads of a rank.
    platform: str = ""
    # "detections/bbox", "picture/last", ... -> path relative to the trial's folder
    artifacts: dict[str, str] = {}
    mlflow_run_id: str = Field("", max_length=64)
    events: list[Event] = []


# --- what `maskray doctor` asks of each node, and what the node answers ------------------------

# Each begins a line of the probe's output. The rest of the line is the store's address, or a
# NodeReport as JSON; the log holds lines of others too.
PROBE_STORE, PROBE_REPORT = "maskray-probe-store", "maskray-probe-report"


class ProbePlan(Record):
    """The plan of one of `nodes` probes. The first probe opens the store and prints its address."""

    index: int = Field(ge=0)
    nodes: int = Field(ge=1)
    address: str  # of this node in the cluster
    store: str = ""  # HOST:PORT; empty for the first probe
    storage: str
    folder: str  # below `storage`, of this examination alone
    mlflow: str = ""
    study_logins: bool = False  # each study has an own login for MLflow, and the node has none
    patience_s: float = Field(60.0, gt=0)  # how long a probe waits for the others


class ClockReport(BaseModel):
    offset_s: float  # the first node's clock minus this one's
    uncertainty_s: float


class LinkReport(BaseModel):
    peer: int  # index of the other probe
    error: str = ""  # empty where the pair could add up numbers; the rest is set then
    address: str = ""
    interface: str = ""
    mib_per_s: float = 0.0


class GpuReport(BaseModel):
    """What a node's torch can do on its GPUs, the first of which speaks for all."""

    error: str = ""  # why torch reaches none, though the driver lists some; the rest is set if not
    name: str = ""  # "Tesla T4 (compute capability 7.5)"
    precisions: list[str] = []  # that it has units for: "fp32", "TF32", "bf16", "fp16"
    kernels: str = ""  # as in Result
    complaints: list[str] = []  # a line for each kernel that does not run there


class NodeReport(BaseModel):
    """A probe fills it in step by step, so it is not frozen. An empty error is none."""

    index: int
    host: str
    now: float  # Unix time
    versions: dict[str, str]  # of Python and of packages, by name
    sources: str  # hash of contract, model, pipelines and workers as installed there
    gpu_driver: str  # "NVIDIA 550.1, 8 devices", why that is not known, or empty without GPUs
    gpu: GpuReport | None = None  # None without GPUs, and from an older version
    disk_free_gib: float
    shm_free_gib: float
    mlflow_error: str
    meeting_error: str = ""
    storage_error: str = ""
    clock: ClockReport | None = None
    links: list[LinkReport] = []
