"""RoIAlign's kernels for GPUs: interpreted on the CPU, and compiled for GPUs not at hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from contract.presets import preset
from model.build import build_detector
from model.gpu import usable
from model.gpu.accelerate import accelerate
from model.roi.operations import Align, Pool, RoIOperation
from tests.model.gpu.without_a_gpu import check

triton = pytest.importorskip("triton", reason="torch came without Triton")

INTERPRETED = """
import torch
from model.gpu import roi_align
from tests.model.gpu.roi_align_cases import CASES, agree, cells_agree, levels_agree

roi_align._CHANNELS = roi_align._TILE_CHANNELS = 4  # two blocks of channels
for case in CASES:
    agree(case)
for sizes in (((2, 3),), ((2, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
    cells_agree(sizes)
levels_agree()
"""
COMPILED = """
from tests.model.gpu.roi_align_cases import compile_all

compile_all({})
"""


@pytest.mark.parametrize(
    ("program", "interpret"),
    [
        (INTERPRETED, True),
        pytest.param(COMPILED.format(90), False, marks=pytest.mark.slow),
        pytest.param(COMPILED.format(80), False, marks=pytest.mark.slow),
    ],
    ids=["interpreted", "compiled for 9.0", "compiled for 8.0"],
)
def test_the_kernels_without_a_gpu(tmp_path, program, interpret):
    check(program, tmp_path, interpret)


def test_the_means_of_few_levels_are_swapped_and_laid_out_for_what_reads_them(monkeypatch):
    monkeypatch.setattr(usable, "tried", dict.fromkeys(usable.KERNELS, ""))
    from model.gpu.roi_align import LevelAlign, by_kernels

    detector = build_detector(preset("r50-fpn"))
    accelerate(detector)
    box, mask = detector.crops.box, detector.crops.mask
    assert type(box) is type(mask) is LevelAlign
    assert (box.channels_last, mask.channels_last) == (False, True)
    strides = (4, 8, 16, 32, 64)
    assert by_kernels(RoIOperation(Align(1, "mean", False), 7, strides)) is not None
    for crop in (Pool(), Align(2, "max", True), Align(0, "mean", True)):
        assert by_kernels(RoIOperation(crop, 7, strides)) is None
    assert by_kernels(RoIOperation(Align(2, "mean", True), 7, (*strides, 128))) is None


def test_tracers_see_shapes_and_gradients_without_a_kernel():
    from model.gpu.neighbourhoods import Neighbourhoods
    from model.gpu.roi_align import LevelAlign

    with FakeTensorMode():
        maps = [torch.empty(2, 8, side, side, requires_grad=True) for side in (16, 8)]
        crops = LevelAlign(Align(2, "mean", True), 7, (4, 8))(maps, torch.empty(5, 5))
        cells = Neighbourhoods()(maps, torch.empty(2, 3, dtype=torch.int64))
        assert crops.shape == (5, 8, 7, 7)
        assert cells.shape == (2, 3, 72)
        gradients = torch.autograd.grad(crops.sum() + cells.sum(), maps)
        assert [g.shape for g in gradients] == [m.shape for m in maps]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_crops_as_the_cpu_does_and_repeats_to_the_bit():
    from tests.model.gpu.roi_align_cases import CASES, agree, cells_agree, repeats

    for case in CASES[:3]:
        agree(case, "cuda")
    cells_agree(((9, 13), (5, 7), (3, 4), (2, 2), (1, 1)), "cuda")
    repeats("cuda")
