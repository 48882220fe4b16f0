"""Whether a GPU computes what the CPU does, the same twice, and without waiting for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from benchmarks.gpu.probes import Probe, Scale, timed
from benchmarks.gpu.work import Work, WorkerStep, batch_of, detector_of
from contract.model import (
    KeypointBranch,
    MaskBranch,
    ModelConfig,
    RoIAlign,
    RoIPool,
    RoIWarp,
    SoftmaxMask,
)
from contract.presets import preset
from model.detector import Detector
from model.structures import Batch

_POINTS = 3


def _tiny(**fields: object) -> ModelConfig:
    return preset("tiny").model_copy(update=fields)


def _arms() -> dict[str, ModelConfig]:
    """What has kernels or shapes of its own on a GPU."""
    return {
        "tiny": _tiny(),
        "softmax, keypoints": _tiny(
            mask=MaskBranch(loss=SoftmaxMask(others="own_class")),
            keypoints=KeypointBranch(num_keypoints=_POINTS, convs=1, width=16),
        ),
        "align of the maximum": _tiny(roi=RoIAlign(reduce="max")),
        "align of all cells": _tiny(roi=RoIAlign(samples=0)),
        "pool": _tiny(roi=RoIPool()),
        "warp": _tiny(roi=RoIWarp()),
        "r50-fpn": preset("r50-fpn"),
        "r50-c4": preset("r50-c4"),
    }


@dataclass(frozen=True)
class Result:
    """Losses by name and gradients by parameter, on the CPU."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]


def agreement(scale: Scale) -> Iterator[Probe]:
    """In fp32 without TF32: the CPU by torch's operations, the GPU by our kernels, twice."""
    side = 128 if scale.dry else 256
    work = Work("tiny", 2, 4, (side, side + 32), "fp32")
    arms = list(_arms().items())[: 2 if scale.dry else None]
    for name, model in arms:
        yield Probe(name, lambda model=model: _compared(model, work))
    yield Probe("bf16, ours beside torch", lambda: _kernels_compared(scale))


@contextmanager
def exact_fp32() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _batch(model: ModelConfig, work: Work) -> Batch:
    batch = batch_of(replace(work, preset="tiny"))
    if isinstance(model.keypoints, KeypointBranch):
        visible = torch.full((work.images, work.objects, _POINTS, 1), 2.0)
        centres = (batch.boxes_xyxy[..., :2] + batch.boxes_xyxy[..., 2:]) / 2
        points = centres[:, :, None].expand(-1, -1, _POINTS, -1)
        return replace(batch, keypoints=torch.cat([points, visible], dim=-1))
    return batch


def _compared(model: ModelConfig, work: Work) -> JsonValue:
    batch = _batch(model, work)
    with exact_fp32():
        cpu = _result(detector_of(model, "cpu", ours=False), batch)
        detector = detector_of(model, "cuda")
        first, second = (_result(detector, batch.to("cuda")) for _ in range(2))
    return {
        "losses": _losses(cpu, first),
        "gradient_error": _distance(cpu, first),
        "worst": _worst(cpu, first),
        "two_runs": _repeated(first, second),
    }


def _kernels_compared(scale: Scale) -> JsonValue:
    """A step of r50-fpn in bf16 by our kernels and by torch's operations on the same GPU."""
    side = 128 if scale.dry else 512
    work = Work("r50-fpn", 2, 8, (side, side))
    batch = batch_of(work).to("cuda")
    torch_result = _result(detector_of(work.model, "cuda", ours=False), batch, bf16=True)
    detector = detector_of(work.model, "cuda")
    first, second = (_result(detector, batch, bf16=True) for _ in range(2))
    return {
        "losses": _losses(torch_result, first),
        "gradient_error": _distance(torch_result, first),
        "worst": _worst(torch_result, first),
        "two_runs": _repeated(first, second),
    }


def _result(detector: Detector, batch: Batch, bf16: bool = False) -> Result:
    detector.zero_grad()
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        terms = detector.losses(batch)
    mean = {n: t.sum.float() / t.count.clamp(min=1) for n, t in terms.items()}
    torch.stack([terms[n].weight * value for n, value in mean.items()]).sum().backward()
    losses = {n: float(value.detach()) for n, value in mean.items()}
    counts = {f"count of {n}": float(t.count) for n, t in terms.items()}
    return Result({**losses, **counts}, _gradients(detector))


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {n: p.grad.detach().float().cpu().contiguous() for n, p in named if p.grad is not None}


def _losses(expected: Result, found: Result) -> JsonValue:
    """Both values, and how far apart they are relative to the first."""
    return {
        name: [value, found.losses[name], abs(found.losses[name] - value) / max(abs(value), 1e-30)]
        for name, value in expected.losses.items()
    }


def _distance(expected: Result, found: Result) -> float:
    pairs = [(g, found.gradients[n]) for n, g in expected.gradients.items()]
    error = sum(float((a - b).double().square().sum()) for a, b in pairs)
    length = sum(float(a.double().square().sum()) for a, _ in pairs)
    return (error / max(length, 1e-60)) ** 0.5


def _worst(expected: Result, found: Result) -> JsonValue:
    """The three parameters whose gradients differ most, relative to their own length."""
    errors = {
        name: float((g - found.gradients[name]).norm() / g.norm().clamp(min=1e-30))
        for name, g in expected.gradients.items()
    }
    return {name: errors[name] for name in sorted(errors, key=lambda n: -errors[n])[:3]}


def _repeated(first: Result, second: Result) -> JsonValue:
    """Whether a step repeats to the bit, and which gradients do not."""
    differing = [n for n, g in first.gradients.items() if not torch.equal(g, second.gradients[n])]
    return {
        "losses_equal": first.losses == second.losses,
        "gradients_equal": not differing,
        "gradient_distance": _distance(first, second),
        "differing": [f"{len(differing)} of {len(first.gradients)}", *differing[-4:]],
    }


def repeats(scale: Scale) -> Iterator[Probe]:
    """Whether two equal steps of r50-fpn give equal bits, and what cuDNN's promise of it costs."""
    work = Work("r50-fpn", scale.usual_images, scale.objects, scale.canvas)
    for deterministic in (False, True):
        name = "cudnn_deterministic" if deterministic else "as trained"
        yield Probe(name, lambda d=deterministic: _equal_steps(scale, work, d))


def _equal_steps(scale: Scale, work: Work, deterministic: bool) -> JsonValue:
    torch.backends.cudnn.deterministic = deterministic
    try:
        detector, batch = detector_of(work.model, "cuda"), batch_of(work).to("cuda")
        step = WorkerStep(detector, work.precision)
        results = []
        for _ in range(2):
            step.optimiser.zero_grad()
            losses = step.gradients(batch).losses_T.tolist()
            named = {str(n): loss for n, loss in enumerate(losses)}
            results.append(Result(named, _gradients(detector)))
        step.optimiser.zero_grad()
        times = timed({"step": lambda: step(batch)}, scale)
        return {"two_runs": _repeated(*results), "times": times}
    finally:
        torch.backends.cudnn.deterministic = False


def waits(scale: Scale) -> Iterator[Probe]:
    """One step under `set_sync_debug_mode("error")`: an operation that waits raises."""
    canvas = scale.canvas if scale.dry else (512, 672)
    for name in ("r50-fpn", "tiny", "r50-c4", "r50-fpn-keypoint", "r50-fpn-softmax"):
        work = Work(name, 2, scale.objects, canvas)
        yield Probe(name, lambda work=work: _step_without_waiting(work))


def _step_without_waiting(work: Work) -> JsonValue:
    step = WorkerStep(detector_of(work.model, "cuda"), work.precision)
    batch = batch_of(work).to("cuda")
    # the first steps fill caches and make the optimiser's state
    for _ in range(2):
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    step(batch)
    torch.cuda.set_sync_debug_mode("default")
    return "none"
