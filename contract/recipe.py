"""One run as one record, and the overrides that make arms of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, JsonValue

from contract.data import DataConfig
from contract.model import ModelConfig
from contract.record import Record, parse_record


class SGD(Record):
    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.02, gt=0)
    lr_batch: int = Field(
        0, ge=0
    )  # the global batch that `lr` is meant for; 0 takes `lr` as it is, without scaling
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    norm_weight_decay: float = Field(1e-4, ge=0)  # for the parameters of normalisation layers
    # of the biases of other layers, as factors on `lr` and `weight_decay`; Detectron has 2 and 0
    bias_lr_factor: float = Field(1.0, gt=0)
    bias_decay_factor: float = Field(1.0, ge=0)


class AdamW(Record):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    lr_batch: int = Field(0, ge=0)  # as in SGD
    weight_decay: float = Field(0.05, ge=0)
    norm_weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)


Optimiser: TypeAlias = Annotated[SGD | AdamW, Field(discriminator="kind")]


class StepSchedule(Record):
    """The rate times `factor` at each drop, after a linear warm-up.

    The paper drops at 120k of its 160k steps.
    """

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
    """Cosine up to the full rate over `rise` of the steps, then down to `final_factor` of it."""

    kind: Literal["one_cycle"] = "one_cycle"
    rise: float = Field(0.25, gt=0, lt=1)
    start_factor: float = Field(0.04, gt=0, le=1)
    final_factor: float = Field(1e-3, ge=0, lt=1)


Schedule: TypeAlias = Annotated[
    StepSchedule | CosineSchedule | OneCycle, Field(discriminator="kind")
]


class Guard(Record):
    """When the loss is not finite or jumps, the run returns to its last good checkpoint.

    It then goes on as `action` says.
    """

    action: Literal["skip_window", "lower_rate"] = "skip_window"
    spike_factor: float = Field(
        10.0, gt=1
    )  # of the running mean of the total loss; what is not finite always counts
    check_every_steps: int = Field(20, ge=1)
    max_rollbacks: int = Field(3, ge=0)
    rate_factor: float = Field(0.5, gt=0, lt=1)  # of "lower_rate"


class GpuArithmetic(Record):
    """What cuDNN and cuBLAS may do on a GPU. The defaults are torch's; a CPU has no such choices.

    TF32 rounds the factors of an fp32 product to 10 bits behind the point and adds in fp32, on the
    tensor cores of Ampere and later GPUs. It does not touch what `loop.precision` puts into bf16.
    """

    tf32_convolutions: bool = True  # cuDNN's
    tf32_products: bool = False  # cuBLAS's: the fully connected layers
    cudnn_benchmark: bool = False  # times its algorithms on every new shape; two runs may differ
    cudnn_deterministic: bool = False  # takes only algorithms that repeat to the bit


EvalPrecision: TypeAlias = Literal["fp32", "bf16"]


class LoopConfig(Record):
    steps: int = Field(160_000, ge=1)  # optimiser steps
    global_batch: int = Field(16, ge=1)  # images per step over all ranks
    max_images_per_forward: int = Field(16, ge=1)  # per rank; a larger share is accumulated
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of layers; weights and losses are fp32
    gpu: GpuArithmetic = GpuArithmetic()
    clip_grad_norm: float = Field(0.0, ge=0)  # 0 does not clip
    ema_decay: float = Field(
        0.0, ge=0, lt=1
    )  # 0 keeps no average; otherwise the average is evaluated
    compile: bool = False
    # on a GPU: forward and backward as one launch for each of at most 10 canvases; set
    # `data.num_canvases` too
    cuda_graphs: bool = False
    log_every_steps: int = Field(50, ge=1)
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    best_metric: str = (
        "segm/AP"  # names the kept best weights, without masks bbox/AP does; tables use the last
    )
    # 0 evaluates at the end alone; -1 four times, at most every 50 steps, for a curve and for
    # whether an arm still learns
    eval_every_steps: int = Field(-1, ge=-1)
    eval_batch: int = Field(8, ge=1)
    eval_precision: EvalPrecision = "fp32"  # of the network; boxes and masks are chosen in fp32
    # Boundary AP of masks as metrics of their own ("boundary/AP"), by size too; it costs time
    eval_boundary: bool = False
    guard: Guard = Guard()


def steps_between_evaluations(every: int, steps: int) -> int:
    """What `eval_every_steps` comes to in a run of that many steps; 0 is at the end alone."""
    if every >= 0:
        return every if every < steps else 0
    quarter = max(50, -(-steps // 4))  # rounded up, so that the last one is the end itself
    return quarter if quarter < steps else 0


class RunConfig(Record):
    """One training run: all that its numbers depend on but bytes of data, weights and sources."""

    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optimiser: Optimiser = SGD()
    schedule: Schedule = StepSchedule()
    loop: LoopConfig = LoopConfig()


# Dotted paths of what evaluation alone reads: they change no number of the training.
EVALUATION_FIELDS = frozenset(
    {
        "data.val",
        "data.oks_sigmas",
        "model.inference.score_threshold",
        "model.inference.nms_iou",
        "model.inference.detections_per_image",
        "model.rpn.pre_nms_test",
        "model.rpn.post_nms_test",
        "model.mask.loss.inference",
        "model.image.short_side_px",
        "model.image.max_side_px",
        "loop.eval_every_steps",
        "loop.eval_batch",
        "loop.eval_precision",
        "loop.eval_boundary",
        "loop.best_metric",
    }
)


def training_record(run: RunConfig) -> dict[str, JsonValue]:
    """The run as JSON data without what evaluation alone reads."""
    record: dict[str, JsonValue] = run.model_dump(mode="json")
    for path in EVALUATION_FIELDS:
        *parents, leaf = path.split(".")
        node: JsonValue = record
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):  # a model without masks has no loss of masks
            node.pop(leaf, None)
    return record


def apply_overrides(
    run: Mapping[str, JsonValue], overrides: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """A copy of nested `run` with dotted paths set.

    To set a `kind` to another one drops the old kind's fields.

    Raises ValueError if a path runs through a value that is not a record.
    """
    result = copied(run)
    # outer paths first, and a `kind` before its fields: the fields then land in the new record
    for path, value in sorted(
        overrides.items(), key=lambda item: (item[0].count("."), not item[0].endswith("kind"))
    ):
        *parents, leaf = path.split(".")
        node = result
        for depth, part in enumerate(parents):
            below = node.setdefault(part, {})
            if not isinstance(below, dict):
                raise ValueError(
                    f"{path}: {'.'.join(parents[: depth + 1])} is {below!r}, it has no fields"
                )
            node = below
        if leaf == "kind" and node.get("kind") != value:
            node.clear()
        node[leaf] = copied(value) if isinstance(value, Mapping) else value
    return result


def copied(data: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {
        key: copied(value) if isinstance(value, Mapping) else value for key, value in data.items()
    }


def parse_run(data: Any, where: str) -> RunConfig:
    return parse_record(RunConfig, data, where)
