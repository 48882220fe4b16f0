"""Cases of RoIAlign against torch's path on the CPU; `test_roi_align` runs them by subprocess."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.gpu import neighbourhoods as cells_kernels
from model.gpu import roi_align, roi_align_kernels
from model.gpu.neighbourhoods import of_rois
from model.gpu.roi_align import LevelAlign
from model.roi.operations import Align, RoIOperation, assign_levels
from model.rpn.network import neighbourhoods


@dataclass(frozen=True)
class Case:
    """Maps of these heights and widths, one per stride, and RoIs cropped at a side."""

    sizes: tuple[tuple[int, int], ...]
    rois: int
    channels: int = 3
    side: int = 3
    samples: int = 2
    aligned: bool = True
    channels_last: bool = True
    dtype: torch.dtype = torch.float32
    images: int = 2

    @property
    def strides(self) -> list[int]:
        return [4 << level for level in range(len(self.sizes))]


CASES = [
    Case(((5, 9), (3, 5), (2, 3), (1, 2)), rois=8, channels=5),
    Case(((4, 5), (2, 3), (1, 2), (1, 1), (1, 1)), rois=8, aligned=False, channels_last=False),
    Case(((5, 4), (3, 2)), rois=7, samples=3, side=2, dtype=torch.float16),
    Case(((3, 9),), rois=7, side=5, samples=1, channels_last=False, images=1),
    Case(((1, 1),), rois=7, side=1, aligned=False),
    Case(((2, 3), (1, 2)), rois=0),
]


def inputs(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Maps, RoIs and the gradient of the crops."""
    generator = torch.Generator().manual_seed(case.rois)
    height, width = (4 * size for size in case.sizes[0])
    corner = torch.rand(case.rois, 2, generator=generator) * torch.tensor([width, height]) - 10
    # Boxes of all levels, and some with negative sides.
    sides = torch.exp(torch.randn(case.rois, 2, generator=generator) + 3.5) - 4
    image = torch.randint(0, case.images, (case.rois, 1), generator=generator)
    rois = torch.cat([image, corner, corner + sides], dim=1)
    odd = [
        [0, 0, 0, 0],  # padding
        [-500, -500, -300, -300],  # off the map
        [0, math.nan, 9, math.inf],
        [0, 0, width, height],
        [-3e38, 0, 3e38, 3e38],
        [0, 0, 600, 600],  # the coarsest level
    ]
    if case.rois > len(odd):
        rois[: len(odd), 1:] = torch.tensor(odd)
    maps = [
        torch.randn(case.images, case.channels, *size, generator=generator).to(case.dtype)
        for size in case.sizes
    ]
    upstream = torch.randn(case.rois, case.channels, case.side, case.side, generator=generator)
    upstream[-1:] = 0  # a RoI that does not count
    return maps, rois, upstream.to(case.dtype)


def agree(case: Case, device: str = "cpu") -> None:
    """Asserts that crops and gradients of the kernels on a device are those of torch on the CPU."""
    maps, rois, upstream = inputs(case)
    crop = Align(case.samples, "mean", case.aligned)
    theirs = RoIOperation(crop, case.side, case.strides)
    ours = LevelAlign(crop, case.side, case.strides)
    ours.channels_last = case.channels_last
    plain = [m.float().requires_grad_() for m in maps]
    given = [m.to(device).requires_grad_() for m in maps]
    wanted, found = theirs(plain, rois), ours(given, rois.to(device))
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    assert found.dtype == case.dtype
    assert found.is_contiguous(memory_format=layout)
    gradients = torch.autograd.grad(wanted, plain, upstream.float())
    ours_of_maps = torch.autograd.grad(found, given, upstream.to(device))
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in ours_of_maps)
    close = {} if case.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    close = close or {"rtol": 1e-4, "atol": 1e-4}
    for one, other in zip([found, *ours_of_maps], [wanted, *gradients], strict=True):
        torch.testing.assert_close(one.float().cpu(), other, **close)


def levels_agree() -> None:
    """Asserts that RoIs become finite and get their levels as torch computes both."""
    sides = torch.tensor([0.0, 1, 111.9, 112, 223.9, 224, 447.9, 448, 4000, math.inf, math.nan])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp(torch.randn(200, 2, generator=generator) * 1.5 + 4.5)
    sides = torch.cat([sides[:, None].expand(-1, 2), drawn])
    rois = torch.cat([torch.ones(len(sides), 1), -sides / 2, sides / 2], dim=1)
    for strides in ((4, 8, 16, 32), (8, 16), (16,)):
        finite, levels = roi_align.assigned(rois, strides)
        wanted = torch.nan_to_num(rois, 0.0, 0.0, 0.0)
        assert torch.equal(finite, wanted)
        assert levels.tolist() == assign_levels(wanted[:, 1:], strides).tolist()


def cells_agree(sizes: tuple[tuple[int, int], ...], device: str = "cpu") -> None:
    """Asserts that the neighbourhoods of every cell, and gradients, are torch's."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, *size, generator=generator, requires_grad=True) for size in sizes]
    # One cell twice: its gradients add up.
    cells = torch.arange(sum(height * width for height, width in sizes)).repeat(2)[None, :-3]
    found = of_rois([m.to(device) for m in maps], cells.to(device)).cpu()
    wanted = neighbourhoods(maps, cells)
    assert torch.equal(found, wanted)
    upstream = torch.randn(wanted.shape, generator=generator)
    ours, theirs = (torch.autograd.grad(values, maps, upstream) for values in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def repeats(device: str) -> None:
    """Asserts that gradients of many RoIs on few cells are equal to the bit in two runs."""
    case = Case(((50, 84), (25, 42)), rois=600, channels=64, side=7, dtype=torch.bfloat16)
    maps, rois, upstream = (
        [m.to(device).requires_grad_() for m in part] if isinstance(part, list) else part.to(device)
        for part in inputs(case)
    )
    operation = LevelAlign(Align(2, "mean", True), case.side, case.strides)
    one, other = (torch.autograd.grad(operation(maps, rois), maps, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def compile_all(capability: int) -> None:
    """Compiles each kernel for a generation of GPUs, with the blocks of `r50-fpn`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    crop = {"CHANNELS": 256, "SIDE": 7, "SAMPLES": 1, "ALIGNED": True}
    block = {"LEVELS": 5, "BLOCK": 128}
    first, last = {"CHANNEL_STEP": 49, "BIN_STEP": 1}, {"CHANNEL_STEP": 1, "BIN_STEP": 256}
    kernels = {
        roi_align_kernels.assign_kernel: {"LEVELS": 4, "ROIS": 128},
        roi_align_kernels.crop_kernel: {**crop, "BINS": 8, "WIDE": 256, **last},
        roi_align_kernels.touch_kernel: {**crop, "PACK": True, "BINS": 16, "WIDE": 256, **first},
        roi_align_kernels.gather_kernel: {**crop, "TILE": 8, "WIDE": 256, "ROWS": 8, "COLUMNS": 8},
        cells_kernels._place: block,
    }
    for kernel, constants in kernels.items():
        signature = {
            name: "constexpr" if name in constants else _type(name) for name in kernel.arg_names
        }
        built = compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": True},
        )
        assert built.asm["cubin"]


def _type(argument: str) -> str:
    if argument in ("gradient", "packed", "crops") or argument.startswith(("map_", "to_map_")):
        return "*bf16"
    if argument in ("cells", "inside"):
        return "*i64" if argument == "cells" else "*u8"
    if argument in ("levels", "touched", "places"):
        return "*i32"
    if argument.startswith("scale_") or argument in ("canonical_side", "second"):
        return "fp32"
    return "*fp32" if argument in ("rois", "finite") else "i32"
