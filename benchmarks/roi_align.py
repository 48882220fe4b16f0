"""RoIAlign over four levels on a GPU: torchvision's kernels, level by level, beside ours.

    python benchmarks/roi_align.py --json

8 images of 800 x 1344, 256 channels in bfloat16, 512 RoIs an image for boxes (side 7) and 128 for
masks (side 14). Milliseconds are medians. Ways:

- corner: torchvision in float32; RoIs of other levels are box 0 of image 0 (until this benchmark)
- away: the same with RoIs of other levels off the map, torch's path today
- atomic: our forward pass, and a backward pass that adds atomically into float32
- ours: `model.gpu.roi_align`, whose backward pass gathers
- others in `blocks`: ours at other sizes of blocks

It compares with float64 on the CPU first, and two runs of each backward pass with each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.gpu import roi_align
from model.gpu.roi_align import LevelAlign, of_levels
from model.gpu.roi_align_kernels import SIZES, of_level, span, taps
from model.roi.operations import Align, RoIOperation, assign_levels

STRIDES = (4, 8, 16, 32)
# Constants of `model.gpu.roi_align`: bins, channels and warps of the forward pass; tile, channels,
# bins of a product and warps of the backward pass.
FORWARD = ("_BINS", "_CHANNELS", "_CROP_WARPS")
BACKWARD = ("_TILE", "_TILE_CHANNELS", "_PRODUCT", "_GATHER_WARPS")
TOUCH = ("_TOUCHED_BINS", "_TOUCHED_CHANNELS")
Blocks: TypeAlias = tuple[tuple[str, ...], tuple[int, ...]]
BLOCKS: list[Blocks] = [
    (FORWARD, (8, 128, 4)),
    (FORWARD, (16, 256, 4)),
    (BACKWARD, (8, 128, 64, 4)),
    (BACKWARD, (8, 256, 32, 4)),
    (TOUCH, (64, 32)),
    (TOUCH, (8, 256)),
]


def drawn_rois(images: int, rois: int, height: int, width: int) -> Tensor:
    """RoIs around 32 objects an image, a quarter of them close; as (R, 5), image by image."""
    generator = torch.Generator().manual_seed(0)
    canvas = torch.tensor([width, height])
    centre = torch.rand(images, 32, 2, generator=generator) * canvas
    side = torch.exp(torch.randn(images, 32, 2, generator=generator) * 0.7 + 4.5)
    one = torch.randint(0, 32, (images, rois, 1), generator=generator).expand(-1, -1, 2)
    spread = torch.where(torch.arange(rois) < rois // 4, 0.15, 0.8)[:, None]
    noise = torch.randn(images, rois, 4, generator=generator)
    middle = centre.gather(1, one) + noise[..., :2] * spread * side.gather(1, one)
    half = side.gather(1, one) * torch.exp(0.3 * noise[..., 2:]) / 2
    boxes = torch.cat([middle - half, middle + half], dim=2)
    boxes = torch.minimum(boxes.clamp(min=0), canvas.repeat(2))
    image = torch.arange(images)[:, None, None].expand(-1, rois, 1)
    return torch.cat([image, boxes], dim=2).flatten(0, 1)


def drawn_maps(images: int, channels: int, height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(images, channels, -(-height // s), -(-width // s), generator=generator)
        for s in STRIDES
    ]


class Corner(RoIOperation):
    """RoIs of other levels are an empty box in the corner of image 0."""

    def _all_levels(self, maps: Sequence[Tensor], rois_R5: Tensor, levels: Tensor) -> Tensor:
        result = torch.zeros(())
        for i, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            mine = levels == i
            own = torch.where(mine[:, None], rois_R5, 0)
            crops = self.crop(features, own, 1 / stride, self.side)
            crops = torch.where(mine[:, None, None, None], crops, 0)
            result = crops if i == 0 else result + crops
        return result


class Atomic(LevelAlign):
    """Our forward pass; its backward pass adds atomically."""

    def forward(self, maps: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        levels = assign_levels(rois_R5[:, 1:], self.strides).to(torch.int32)
        crops: Tensor = _Added.apply(self, rois_R5, levels, *maps)
        return crops


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: LevelAlign, rois: Tensor, levels: Tensor, *maps: Tensor
    ) -> Tensor:
        ctx.operation, ctx.shapes = operation, [m.shape for m in maps]
        ctx.save_for_backward(rois, levels)
        crop, side = operation.crop, operation.side
        args = (operation.strides, side, crop.samples, crop.aligned, operation.channels_last)
        return roi_align.align_levels(maps, rois, levels, *args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        crop, strides, shapes = ctx.operation.crop, ctx.operation.strides, ctx.shapes
        rois, channels, side, _ = gradient.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums = [torch.zeros(b, h, w, c, device=gradient.device) for b, c, h, w in shapes]
        blocks = triton.cdiv(side * side, 16) * triton.cdiv(channels, 128)
        _add[(rois * blocks,)](
            gradient,
            *of_levels(sums),
            *of_levels([shape[2] for shape in shapes]),
            *of_levels([shape[3] for shape in shapes]),
            *of_levels([1 / stride for stride in strides]),
            *ctx.saved_tensors,
            channels,
            side,
            crop.samples,
            crop.aligned,
            16,
            128,
            enable_fp_fusion=True,
        )
        return None, None, None, *(s.to(gradient.dtype).permute(0, 3, 1, 2) for s in sums)


# fmt: off
@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    gradient,
    map_0, map_1, map_2, map_3, map_4,
    height_0, height_1, height_2, height_3, height_4,
    width_0, width_1, width_2, width_3, width_4,
    scale_0, scale_1, scale_2, scale_3, scale_4,
    rois,
    levels,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """A program adds the gradients of BINS bins of WIDE channels of a RoI to its cells."""
    bin_blocks = tl.cdiv(SIDE * SIDE, BINS)
    blocks = bin_blocks * tl.cdiv(CHANNELS, WIDE)
    roi, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    level = tl.load(levels + roi)
    height = of_level(level, height_0, height_1, height_2, height_3, height_4)
    width = of_level(level, width_0, width_1, width_2, width_3, width_4)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    corner = rois + roi * 5 + 1
    x0, bin_width = span(corner, scale, SIDE, ALIGNED)
    y0, bin_height = span(corner + 1, scale, SIDE, ALIGNED)
    image = tl.load(rois + roi * 5).to(tl.int64)
    channel = block // bin_blocks * WIDE + tl.arange(0, WIDE)
    cells = of_level(level, map_0, map_1, map_2, map_3, map_4)
    cells += image * (height * width * CHANNELS)
    cells += channel[None, :]
    place = block % bin_blocks * BINS + tl.arange(0, BINS)
    row, column = place // SIDE, place % SIDE
    there = (place < SIDE * SIDE)[:, None] & (channel < CHANNELS)[None, :]
    own = gradient + roi.to(tl.int64) * (SIDE * SIDE * CHANNELS)
    numbers = tl.load(own + place[:, None] * CHANNELS + channel[None, :], there, 0.0)
    numbers = numbers.to(tl.float32) / (SAMPLES * SAMPLES)
    # Padding and RoIs that do not count.
    if tl.max(tl.max(tl.abs(numbers), axis=1), axis=0) > 0:
        for i in tl.static_range(SAMPLES):
            y = y0 + row * bin_height + (i + 0.5) * bin_height / SAMPLES
            top, bottom, down, in_rows = taps(y, height)
            for j in tl.static_range(SAMPLES):
                x = x0 + column * bin_width + (j + 0.5) * bin_width / SAMPLES
                left, right, across, in_columns = taps(x, width)
                adds = there & (in_rows & in_columns)[:, None]
                a = cells + ((top * width + left) * CHANNELS)[:, None]
                b = cells + ((top * width + right) * CHANNELS)[:, None]
                c = cells + ((bottom * width + left) * CHANNELS)[:, None]
                d = cells + ((bottom * width + right) * CHANNELS)[:, None]
                part = ((1 - down) * (1 - across))[:, None]
                tl.atomic_add(a, numbers * part, adds, sem="relaxed")
                part = ((1 - down) * across)[:, None]
                tl.atomic_add(b, numbers * part, adds, sem="relaxed")
                part = (down * (1 - across))[:, None]
                tl.atomic_add(c, numbers * part, adds, sem="relaxed")
                tl.atomic_add(d, numbers * (down * across)[:, None], adds, sem="relaxed")


def milliseconds(call: Callable[[], object], rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


def ways(side: int, channels_last: bool) -> dict[str, RoIOperation]:
    crop = Align(2, "mean", aligned=True)
    operations: dict[str, RoIOperation] = {
        "corner": Corner(crop, side, STRIDES),
        "away": RoIOperation(crop, side, STRIDES),
        "atomic": Atomic(crop, side, STRIDES),
        "ours": LevelAlign(crop, side, STRIDES),
    }
    for operation in operations.values():
        if isinstance(operation, LevelAlign):
            operation.channels_last = channels_last
    return operations


def times(operation: RoIOperation, maps: list[Tensor], rois: Tensor) -> dict[str, Any]:
    """Milliseconds forward and backward, the peak memory, and whether two runs are equal."""
    with torch.autocast("cuda", torch.bfloat16):
        crops = operation(maps, rois)
        forward = milliseconds(lambda: operation(maps, rois))
    generator = torch.Generator("cuda").manual_seed(0)
    upstream = torch.empty_like(crops).normal_(generator=generator)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(crops, maps, upstream, retain_graph=True)

    one, other = backward(), backward()
    equal = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    del one, other
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    backward()
    peak = torch.cuda.max_memory_allocated() - resident
    return {
        "forward_ms": forward,
        "backward_ms": milliseconds(backward),
        "backward_peak_mib": round(peak / 2**20),
        "repeats": equal,
    }


def errors(side: int) -> dict[str, float]:
    """The largest error of crops and gradients beside float64 on the CPU, in the largest value."""
    rois = drawn_rois(2, 64, 200, 336)
    maps = [m.bfloat16() for m in drawn_maps(2, 32, 200, 336)]
    wide = [m.double().requires_grad_() for m in maps]
    exact = RoIOperation(Align(2, "mean", aligned=True), side, STRIDES)(wide, rois.double())
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = [exact.detach(), *torch.autograd.grad(exact, wide, upstream.double())]
    result = {}
    for name, operation in ways(side, channels_last=side == 14).items():
        given = [
            m.cuda().contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps
        ]
        with torch.autocast("cuda", torch.bfloat16):
            crops = operation(given, rois.cuda())
        found = [
            crops.detach(),
            *torch.autograd.grad(crops, given, upstream.cuda().to(crops.dtype)),
        ]
        result[name] = max(
            float((one.double().cpu() - other).abs().max() / other.abs().max())
            for one, other in zip(found, wanted, strict=True)
        )
    return result


def warm(number: int) -> None:
    """Compiles what one entry of `BLOCKS` needs; Triton keeps it on the disk."""
    names, values = BLOCKS[number]
    for name, value in zip(names, values, strict=True):
        setattr(roi_align, name, value)
    maps, rois = on_gpu(1, 64), drawn_rois(1, 8, 64, 64).cuda()
    for side in (7, 14):
        crops = ways(side, side == 14)["ours"](maps, rois)
        torch.autograd.grad(crops, maps, torch.ones_like(crops))
    torch.cuda.synchronize()


def on_gpu(images: int, height: int, width: int = 64) -> list[Tensor]:
    return [
        m.cuda().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
        for m in drawn_maps(images, 256, height, width)
    ]


def of_blocks(
    blocks: list[Blocks], maps: list[Tensor], rois: dict[int, Tensor]
) -> dict[str, dict[str, float]]:
    """Milliseconds of ours, forward or backward, at these sizes of blocks."""
    result = {}
    for names, values in blocks:
        before = [getattr(roi_align, name) for name in names]
        for name, value in zip(names, values, strict=True):
            setattr(roi_align, name, value)
        direction = "forward_ms" if names == FORWARD else "backward_ms"
        label = ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
        result[label] = {
            f"side {side} {direction}": times(ways(side, side == 14)["ours"], maps, r)[direction]
            for side, r in rois.items()
        }
        for name, value in zip(names, before, strict=True):
            setattr(roi_align, name, value)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--warm", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm >= 0:
        warm(args.warm)
        return
    # Triton compiles on one core a process.
    command = [sys.executable, __file__, "--warm"]
    compiling = [subprocess.Popen([*command, str(number)]) for number in range(len(BLOCKS))]
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "errors": {f"side {side}": errors(side) for side in (7, 14)},
    }
    maps = on_gpu(8, 800, 1344)
    rois = {side: drawn_rois(8, number, 800, 1344).cuda() for side, number in ((7, 512), (14, 128))}
    compiled = [blocks for blocks, p in zip(BLOCKS, compiling, strict=True) if not p.wait()]
    for side, r in rois.items():
        for name, operation in ways(side, channels_last=side == 14).items():
            found[f"side {side} {name}"] = times(operation, maps, r)
            torch.cuda.empty_cache()
    # What a linear layer would cost that reads channels-last crops.
    last = ways(7, channels_last=True)["ours"]
    found["side 7 ours, channels last"] = times(last, maps, rois[7])
    crops = last(maps, rois[7]).detach()
    found["side 7 flatten_ms"] = milliseconds(lambda: crops.flatten(1).contiguous())
    found["blocks"] = of_blocks(compiled, maps, rois)
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
