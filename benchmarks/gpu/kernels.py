"""Where a step's time on a GPU goes: its kernels, RoIAlign old and new, suppression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from pydantic import JsonValue
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.probes import Probe, Scale, bursts_of, timed
from benchmarks.gpu.work import Work, WorkerStep, batch_of, detector_of
from contract.presets import preset
from model.detector import Detector
from model.roi.operations import assign_levels
from model.rpn.nms import Suppression, nms_listwise

# the first of these words in a kernel's name says what it does
_KINDS = {
    "RoIAlign backward": ("roi_align_backward", "RoIAlignBackward"),
    "RoIAlign": ("roi_align", "crop_kernel", "touch_kernel", "gather_kernel"),
    "suppression": ("_overlaps", "_stay"),
    "copies of memory": ("Memcpy", "Memset"),
    "optimiser": ("multi_tensor", "FusedSgd", "FusedAdam"),
    "convolutions and products": (
        "gemm", "xmma", "cutlass", "conv", "wgrad", "dgrad", "fprop", "cudnn", "nvjet", "nhwc",
    ),
    "sorting": ("sort", "Sort", "topk", "TopK", "radix", "scan", "Scan", "gatherTopK"),
    "sums": ("reduce", "Reduce"),
    "copies and casts": ("copy", "Copy", "CatArray"),
    "indexing": ("index", "gather", "scatter", "Index"),
    "pooling": ("pool",),
    "element by element": ("elementwise",),
}  # fmt: skip


def kernels(scale: Scale) -> Iterator[Probe]:
    """Busy time beside wall time is what CUDA graphs could gain at most."""
    work = Work("r50-fpn", scale.usual_images, scale.objects, scale.canvas)
    yield Probe(f"{work.images} images", lambda: _profiled(scale, work))


def _profiled(scale: Scale, work: Work, steps: int = 3) -> JsonValue:
    detector = detector_of(work.model, "cuda")
    step, batch = WorkerStep(detector, work.precision), batch_of(work).to("cuda")
    wall = bursts_of({"step": lambda: step(batch)}, scale)["step"]
    handles = list(_name_parts(detector))
    # the null CUDA has no CUPTI
    watched = {ProfilerActivity.CPU} if scale.dry else {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with profile(activities=watched) as profiled:
        for _ in range(steps):
            step(batch)
        torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    events = profiled.key_averages()
    rows = [
        (e.key, e.self_device_time_total / 1e3 / steps, round(e.count / steps))
        for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    parts = {
        e.key.removeprefix("part "): round(e.device_time_total / 1e3 / steps, 3)
        for e in events
        if e.key.startswith("part ") and e.device_type == DeviceType.CPU
    }
    busy = sum(ms for _, ms, _ in rows)
    kinds: Counter[str] = Counter()
    for name, ms, _ in rows:
        kinds[_kind(name)] += ms  # type: ignore[assignment]
    top = sorted(rows, key=lambda row: -row[1])[:40]
    return {
        "wall_ms": round(wall.ms, 3),
        "busy_ms": round(busy, 3),
        "launches": sum(count for *_, count in rows),
        "forward_ms_by_part": parts,
        "ms_by_kind": {kind: round(ms, 3) for kind, ms in kinds.most_common()},
        "top": [[name[:120], round(ms, 3), count] for name, ms, count in top],
    }


def _kind(kernel: str) -> str:
    for kind, words in _KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "other"


def _name_parts(detector: Detector) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Ranges in the profile for the detector's parts: the forward pass of each."""
    for name, module in detector.named_children():
        open_ranges: list[record_function] = []

        def enter(
            _: object, __: object, name: str = name, ranges: list[record_function] = open_ranges
        ) -> None:
            ranges.append(record_function(f"part {name}"))
            ranges[-1].__enter__()

        def leave(
            _: object, __: object, ___: object, ranges: list[record_function] = open_ranges
        ) -> None:
            ranges.pop().__exit__(None, None, None)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)


def roi_align(scale: Scale) -> Iterator[Probe]:
    """Crops of 512 RoIs an image from four maps, forward and backward.

    Before: each RoI from every map, with box 0 in the place of those of other levels, which
    torchvision's backward pass adds up atomically. Then today's path by torch's operations, and
    by our kernels.
    """
    images, model = scale.usual_images, preset("r50-fpn")
    strides = (4, 8, 16, 32)
    plain, ours = (detector_of(model, "cuda", ours=ours).crops for ours in (False, True))
    for side, each in (("box", 512), ("mask", 128)):
        rois = _drawn_rois(images, 8 if scale.dry else each, scale.canvas)
        operations = {
            "before": lambda m, r=rois, s=side: _before(m, r, strides, 7 if s == "box" else 14),
            "torch": lambda m, r=rois, s=side: getattr(plain, s)(m, r),
            "ours": lambda m, r=rois, s=side: getattr(ours, s)(m, r),
        }
        for name in operations:
            yield Probe(
                f"{side}, {name}",
                lambda o=operations[name], b=operations["before"]: _cropped(scale, images, o, b),
            )


def _drawn_rois(images: int, each: int, canvas: tuple[int, int]) -> Tensor:
    """Sides from 8 to 1000 pixels, evenly in their logarithm: all levels have some."""
    generator = torch.Generator().manual_seed(0)
    size_xy = torch.tensor([float(canvas[1]), float(canvas[0])])
    sides = 8 * 125 ** torch.rand(images * each, 2, generator=generator)
    start = torch.rand(images * each, 2, generator=generator) * size_xy * 0.9
    image = torch.arange(images).repeat_interleave(each).float()
    return torch.cat([image[:, None], start, (start + sides).minimum(size_xy)], dim=1).cuda()


def _before(maps: Sequence[Tensor], rois: Tensor, strides: Sequence[int], side: int) -> Tensor:
    levels, result = assign_levels(rois[:, 1:], strides), None
    for level, (features, stride) in enumerate(zip(maps, strides, strict=True)):
        mine = levels == level
        own = torch.where(mine[:, None], rois, 0)
        crops = torchvision.ops.roi_align(features, own, (side, side), 1 / stride, 2, True)
        crops = torch.where(mine[:, None, None, None], crops, 0)
        result = crops if result is None else result + crops
    assert result is not None
    return result


def _cropped(
    scale: Scale,
    images: int,
    crop: Callable[[list[Tensor]], Tensor],
    before: Callable[[list[Tensor]], Tensor],
) -> JsonValue:
    """Times under autocast in bf16 on channels-last maps, as training has them."""
    height, width = scale.canvas
    torch.manual_seed(0)
    maps = [
        torch.randn(images, 256, height // s, width // s, device="cuda", dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for s in (4, 8, 16, 32)
    ]
    with torch.autocast("cuda", torch.bfloat16):
        crops, expected = crop(maps), before(maps)
    upstream = torch.randn_like(crops)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(crops, maps, upstream, retain_graph=True)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return crop(maps)

    wanted = torch.autograd.grad(expected, maps, upstream.to(expected.dtype))
    first, second = backward(), backward()
    times = timed({"forward": forward, "backward": backward}, scale)
    assert isinstance(times, dict)
    return {
        **times,
        "crops_off": float((crops.detach().float() - expected.detach().float()).abs().max()),
        "gradient_error": max(
            float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
            for a, b in zip(first, wanted, strict=True)
        ),
        "repeats": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
    }


def suppression(scale: Scale) -> Iterator[Probe]:
    """Lists of boxes against torchvision's suppression of one list, on the CPU."""
    for boxes in scale.suppressed:
        yield Probe(f"8 lists of {boxes}", lambda n=boxes: _suppressed(scale, n))


def _suppressed(scale: Scale, count: int) -> JsonValue:
    generator = torch.Generator().manual_seed(count)
    start = 300 * torch.rand(8, count, 2, generator=generator)
    sides = 1 + 150 * torch.rand(8, count, 2, generator=generator)
    boxes = torch.cat([start, start + sides], dim=-1)
    valid = torch.rand(8, count, generator=generator) < 0.9
    there = boxes.cuda(), valid.cuda()
    detector = detector_of(preset("tiny"), "cuda")
    assert detector.rpn is not None
    ours = next(m for n, m in detector.rpn.named_modules() if "suppress" in n.lower())
    plain = Suppression(ours.max_iou)
    expected = nms_listwise(boxes, valid, float(ours.max_iou))
    times = timed({"ours": lambda: ours(*there), "torch": lambda: plain(*there)}, scale)
    assert isinstance(times, dict)
    return {"equal": torch.equal(ours(*there).cpu(), expected), **times}
