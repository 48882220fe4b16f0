"""One run as one record, the overrides that make arms of it, and what a worker and the orchestrator tell each other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from model.config import ModelConfig, Record, preset
from pipelines.config import DataConfig

# --- recipe ---------------------------------------------------------------------------------------------------------


class SGD(Record):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.02, gt=0)
    lr_batch: int = Field(0, ge=0)  # the global batch that `lr` is meant for; 0 takes `lr` as it is, without scaling
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    norm_weight_decay: float = Field(1e-4, ge=0)  # for the parameters of normalisation layers


class AdamW(Record):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    lr_batch: int = Field(0, ge=0)  # as in SGD
    weight_decay: float = Field(0.05, ge=0)
    norm_weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)


Optimiser: TypeAlias = Annotated[SGD | AdamW, Field(discriminator="kind")]


class StepSchedule(Record):
    """The rate times `factor` at each drop, after a linear warm-up (the paper: 160k steps, drop at 120k)."""

    kind: Literal["step"] = "step"
    drop_steps: tuple[int, ...] = (120_000,)
    factor: float = Field(0.1, gt=0, lt=1)
    warmup_steps: int = Field(1000, ge=0)
    warmup_factor: float = Field(0.001, ge=0, le=1)


class CosineSchedule(Record):
    kind: Literal["cosine"] = "cosine"
    final_factor: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int = Field(1000, ge=0)
    warmup_factor: float = Field(0.001, ge=0, le=1)


class OneCycle(Record):
    """Cosine up to the full rate over `rise` of the steps, cosine down to `final_factor` of it after."""

    kind: Literal["one_cycle"] = "one_cycle"
    rise: float = Field(0.25, gt=0, lt=1)
    start_factor: float = Field(0.04, gt=0, le=1)
    final_factor: float = Field(1e-3, ge=0, lt=1)


Schedule: TypeAlias = Annotated[StepSchedule | CosineSchedule | OneCycle, Field(discriminator="kind")]


class Guard(Record):
    """What happens when the loss is not finite or jumps: back to the last good checkpoint, then on as `action` says."""

    action: Literal["skip_window", "lower_rate"] = "skip_window"
    spike_factor: float = Field(10.0, gt=1)  # of the running mean of the total loss; what is not finite always counts
    check_every_steps: int = Field(20, ge=1)
    max_rollbacks: int = Field(3, ge=0)
    rate_factor: float = Field(0.5, gt=0, lt=1)  # of "lower_rate"


class LoopConfig(Record):
    steps: int = Field(160_000, ge=1)  # optimiser steps
    global_batch: int = Field(16, ge=1)  # images per step over all ranks
    max_images_per_forward: int = Field(16, ge=1)  # per rank; a larger share is accumulated
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_grad_norm: float = Field(0.0, ge=0)  # 0 does not clip
    ema_decay: float = Field(0.0, ge=0, lt=1)  # 0 keeps no average; otherwise the average is evaluated
    compile: bool = False
    log_every_steps: int = Field(50, ge=1)
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    best_metric: str = "segm/AP"  # names the kept best weights, without masks bbox/AP does; tables use the last
    eval_every_steps: int = Field(0, ge=0)  # 0 evaluates at the end alone
    eval_batch: int = Field(8, ge=1)
    guard: Guard = Guard()


class RunConfig(Record):
    """One training run: everything that its numbers depend on, apart from the bytes of data, weights and sources."""

    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optimiser: Optimiser = SGD()
    schedule: Schedule = StepSchedule()
    loop: LoopConfig = LoopConfig()


# --- from nested data to a run --------------------------------------------------------------------------------------


# Where a preset's recipe differs from the defaults above, which are Mask R-CNN's (section 3.1): 160k steps of 16
# images, rate 0.02, divided by 10 at 120k, weight decay 1e-4, momentum 0.9, images of 800 px.
_RECIPES: dict[str, dict[str, Any]] = {
    # Faster R-CNN (1506.01497), section 4.2: 240k steps at 0.003 and 80k at 0.0003, 8 images, 600 px.
    "vgg16-faster-rcnn": {
        "data": {"short_sides_px": [600], "max_side_px": 1000},
        "optimiser": {"kind": "sgd", "lr": 0.003, "weight_decay": 5e-4, "norm_weight_decay": 0.0},
        "schedule": {"kind": "step", "drop_steps": [240_000]},
        "loop": {"steps": 320_000, "global_batch": 8, "best_metric": "bbox/AP"},
    },
    # Table 2a: 8 images a step at half the rate, for as many steps.
    "x101-64x4d-fpn": {"optimiser": {"kind": "sgd", "lr": 0.01}, "loop": {"global_batch": 8}},
    # Section 5: 90k steps, drops at 60k and 80k, short sides from [640, 800].
    "r50-fpn-keypoint": {
        "data": {
            "short_sides_px": [640, 672, 704, 736, 768, 800],
            "filter": {"categories": ["person"], "require_keypoints": True},
        },
        "schedule": {"kind": "step", "drop_steps": [60_000, 80_000]},
        "loop": {"steps": 90_000, "best_metric": "keypoints/AP"},
    },
    # CPU scale: 400 steps on 128 px.
    "tiny": {
        "data": {"short_sides_px": [128], "max_side_px": 128, "num_loader_workers": 0, "bucket_batches": 8},
        "optimiser": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "one_cycle"},
        "loop": {
            "steps": 400,
            "global_batch": 8,
            "clip_grad_norm": 10.0,
            "checkpoint_every_steps": 100,
            "log_every_steps": 10,
        },
    },
}


def run_preset(name: str) -> dict[str, Any]:
    """The preset's architecture with the paper's recipe for it, as data without `data.train` and `data.val`."""
    return {"model": preset(name).model_dump(mode="json"), "data": {}, **_copy(_RECIPES.get(name, {}))}


def apply_overrides(run: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `run` with dotted paths set. Setting a `kind` to another one drops the old kind's fields.

    Raises ValueError if a path runs through a value that is not a record.
    """
    result = _copy(run)
    for path, value in sorted(overrides.items(), key=lambda item: (item[0].count("."), not item[0].endswith("kind"))):
        *parents, leaf = path.split(".")
        node = result
        for depth, part in enumerate(parents):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {'.'.join(parents[: depth + 1])} is {node!r}, it has no fields")
        if leaf == "kind" and node.get("kind") != value:
            node.clear()
        node[leaf] = _copy(value) if isinstance(value, Mapping) else value
    return result


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def parse_record(record: type[AnyRecord], data: Any, where: str) -> AnyRecord:
    """Validates nested data as `record`. Raises ValueError of one line: `where`, path, value, nearest valid name."""
    try:
        return record.model_validate(data)
    except ValidationError as error:
        problems = [_explain(record, data, problem) for problem in error.errors(include_url=False)]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{more}") from None


def parse_run(data: Any, where: str) -> RunConfig:
    return parse_record(RunConfig, data, where)


def _explain(record: type[BaseModel], data: Any, problem: Any) -> str:
    parts = _without_union_tags(data, problem["loc"])
    path = ".".join(str(part) for part in parts) or "the record"
    if problem["type"] == "extra_forbidden":
        names = field_names(record, parts[:-1], data)
        near = difflib.get_close_matches(str(parts[-1]), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        return f"{path}: no such field; {hint}"
    if problem["type"] == "missing":
        return f"{path}: is required"
    if problem["type"] == "union_tag_invalid":
        kinds = [tag.strip("' ") for tag in problem["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(problem["ctx"]["tag"]), kinds, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(kinds)}"
        return f"{path}.kind: no kind {problem['ctx']['tag']!r}; {hint}"
    if problem["type"] == "union_tag_not_found":
        return f"{path}.kind: is required, it says which fields there are"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, Mapping | BaseModel) else f", got {value!r}"
    return f"{path}: {message}{shown}"


def _without_union_tags(data: Any, location: Sequence[Any]) -> list[Any]:
    """Pydantic follows the name of a union's field by the tag it chose; people do not write that tag in a path."""
    parts: list[Any] = []
    node, at_union = data, False
    for step in location:
        if at_union and isinstance(node, Mapping) and node.get("kind") == step:
            at_union = False
            continue
        parts.append(step)
        if isinstance(node, Mapping):
            node = node.get(step)
        elif isinstance(node, list | tuple) and isinstance(step, int) and step < len(node):
            node = node[step]
        at_union = isinstance(node, Mapping) and "kind" in node
    return parts


def field_names(record: type[BaseModel], parts: Sequence[Any], data: Any) -> list[str]:
    """The fields of the record that `parts` lead to in `data`; of a union, those of the `kind` in `data`."""
    current: list[type[BaseModel]] = [record]
    node = data
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
        found = [r.model_fields[part].annotation for r in current if part in r.model_fields]
        current = [r for annotation in found for r in _records(annotation)]
        kind = node.get("kind") if isinstance(node, Mapping) else None
        if kind is not None:
            current = [r for r in current if "kind" not in r.model_fields or r.model_fields["kind"].default == kind]
    return sorted({name for r in current for name in r.model_fields})


def _records(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [r for arg in get_args(annotation) for r in _records(arg)]


# --- what a worker is told, and what it leaves behind ---------------------------------------------------------------

# Exit statuses of `python -m workers.train` and `python -m workers.ray_entry`, read by the orchestrator.
EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_PREEMPTED, EXIT_STOPPED, EXIT_DIVERGED, EXIT_OUT_OF_MEMORY = (
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
    max_nodes: int = Field(0, ge=0)  # 1 keeps the gang together; above that Ray packs it as tightly as it can
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
    error_class: Literal["none", "person", "out_of_memory", "node", "collective", "diverged", "unknown"] = "none"
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
    artifacts: dict[str, str] = {}  # "detections/bbox", "picture/last", ... -> path relative to the trial's folder
    mlflow_run_id: str = ""
    events: list[Event] = []


# --- what `maskray doctor` asks of each node, and what it answers -----------------------------------------------------

PROBE_STORE, PROBE_REPORT = "maskray-probe-store", "maskray-probe-report"  # each begins a line of the probe's output


class ProbePlan(Record):
    """For one of `nodes` probes. `store` is printed by the first one, as HOST:PORT."""

    index: int = Field(ge=0)
    nodes: int = Field(ge=1)
    address: str  # of this node in the cluster
    store: str = ""
    storage: str
    folder: str  # below `storage`, of this examination alone
    mlflow: str = ""
    patience_s: float = Field(60.0, gt=0)  # with the other nodes


class ClockReport(BaseModel):
    offset_s: float  # the first node's clock minus this one's
    uncertainty_s: float


class LinkReport(BaseModel):
    peer: int
    error: str = ""
    address: str = ""
    interface: str = ""
    mib_per_s: float = 0.0


class NodeReport(BaseModel):
    index: int
    host: str
    now: float
    versions: dict[str, str]
    sources: str  # hash of model, pipelines and workers as installed there
    gpu_driver: str
    disk_free_gib: float
    shm_free_gib: float
    mlflow_error: str
    meeting_error: str = ""
    storage_error: str = ""
    clock: ClockReport | None = None
    links: list[LinkReport] = []
