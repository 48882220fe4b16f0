"""The precision that a device really has, and what cuBLAS and cuDNN may do in a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from contract.recipe import GpuArithmetic, LoopConfig
from tests.workers.ranks import run_ranks
from workers.training.arithmetic import (
    _cpu_computes_in,
    check_precision,
    doubts,
    in_words,
    native_precisions,
    set_arithmetic,
    slow_precision,
)
from workers.training.world import World, check_own_gpus

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """torch's own questions about a GPU of the given name and compute capability."""
    name, major, minor = request.param
    properties = SimpleNamespace(name=name, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    # bf16 by emulation works on all of them: that must not count
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)


V100, T4 = ("Tesla V100-SXM2-16GB", 7, 0), ("Tesla T4", 7, 5)
H100 = ("NVIDIA H100 80GB HBM3", 9, 0)


@pytest.mark.parametrize("gpu", [V100, T4], indirect=True)
def test_emulated_bf16_is_refused_with_a_remedy_that_the_gpu_has(gpu):
    assert torch.cuda.is_bf16_supported(), "as torch says by default"
    with pytest.raises(ValueError, match=r"Tesla .*\(compute capability 7\.[05]\) has no bf16"):
        check_precision(LoopConfig(precision="bf16"), GPU)
    with pytest.raises(ValueError, match=r"loop\.eval_precision: Tesla .* choose 'fp32'"):
        check_precision(LoopConfig(eval_precision="bf16"), GPU)
    for remedy in ("fp16", "fp32"):
        check_precision(LoopConfig(precision=remedy), GPU)
        assert remedy in native_precisions(GPU)
        assert in_words(LoopConfig(precision=remedy), GPU) == remedy, "no TF32 there either"
    with pytest.raises(ValueError, match=r"loop\.eval_precision: .* has no bf16"):
        check_precision(LoopConfig(eval_precision="bf16"), GPU)


@pytest.mark.parametrize("gpu", [H100], indirect=True)
def test_a_gpu_says_what_fp32_means_on_it(gpu):
    assert native_precisions(GPU) == ["fp32", "TF32", "bf16", "fp16"]
    check_precision(LoopConfig(precision="bf16"), GPU)
    assert in_words(LoopConfig(precision="bf16"), GPU) == "bf16"
    assert in_words(LoopConfig(), GPU) == "fp32 (convolutions in TF32)"
    exact = GpuArithmetic(tf32_convolutions=False, cudnn_deterministic=True)
    assert in_words(LoopConfig(gpu=exact), GPU) == "fp32 (cuDNN repeats to the bit)"
    fast = GpuArithmetic(tf32_products=True, cudnn_benchmark=True)
    words = "fp32 (convolutions in TF32, products in TF32, cuDNN timed its algorithms)"
    assert in_words(LoopConfig(gpu=fast), GPU) == words


def test_scores_from_bf16_are_said(monkeypatch):
    monkeypatch.setattr("workers.training.arithmetic._cpu_computes_in", lambda asked: False)
    assert in_words(LoopConfig(eval_precision="bf16"), CPU) == "fp32 (evaluated in bf16)"
    both = LoopConfig(precision="bf16", eval_precision="bf16")
    assert in_words(both, CPU) == "bf16 (imitated, evaluated in bf16)"
    assert in_words(LoopConfig(), CPU) == "fp32"


def choices() -> dict[str, Any]:
    """What torch answers under its old and under its new names."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "tf32_convolutions": (cudnn.allow_tf32, cudnn.conv.fp32_precision == "tf32"),
        "tf32_products": (
            cublas.allow_tf32,
            cublas.fp32_precision == "tf32",
            torch.get_float32_matmul_precision() != "highest",
        ),
        "cudnn_benchmark": (cudnn.benchmark,),
        "cudnn_deterministic": (cudnn.deterministic,),
    }


def test_the_defaults_are_torch_s_own():
    stated = GpuArithmetic().model_dump()
    assert {name: set(values) for name, values in choices().items()} == {
        name: {value} for name, value in stated.items()
    }


@pytest.mark.parametrize("name", GpuArithmetic.model_fields)
def test_each_choice_is_set_alone_and_both_of_torch_s_apis_read_it(name):
    before = choices()
    changed = not getattr(GpuArithmetic(), name)
    loop = LoopConfig(gpu=GpuArithmetic.model_validate({name: changed}))
    try:
        set_arithmetic(loop, CPU)
        assert choices() == before, "a CPU has no such choices"
        set_arithmetic(loop, GPU)
        now = choices()
        assert set(now.pop(name)) == {changed}
        assert now == {other: value for other, value in before.items() if other != name}
    finally:
        set_arithmetic(LoopConfig(), GPU)
    assert choices() == before


def test_a_choice_without_effect_is_told():
    loop = LoopConfig(gpu=GpuArithmetic(cudnn_benchmark=True))
    assert doubts(loop, CPU) == ["loop.gpu: has no effect on a CPU"]
    assert doubts(LoopConfig(), CPU) == doubts(loop, GPU) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_cpu_imitates_is_told(monkeypatch, precision):
    loop = LoopConfig(precision=precision)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not _cpu_computes_in(precision)
    monkeypatch.setattr("workers.training.arithmetic._cpu_computes_in", lambda asked: False)
    assert f"imitates {precision}" in slow_precision(loop, CPU)
    assert slow_precision(loop, GPU) == slow_precision(LoopConfig(), CPU) == ""
    monkeypatch.setattr("workers.training.arithmetic._cpu_computes_in", lambda asked: True)
    assert slow_precision(loop, CPU) == ""


def refusals(world: World, places: list[list[str]]) -> list[str]:
    """What `check_own_gpus` says where rank r of a case has its GPU at `places[case][r]`."""
    on_gpu, said = replace(world, device=GPU), []
    for case in places:
        with patch("workers.training.world._bus_id", lambda device, case=case: case[world.rank]):
            try:
                check_own_gpus(on_gpu)
                said.append("")
            except ValueError as error:
                said.append(str(error))
    return said


def test_two_ranks_on_one_gpu_are_refused_on_every_rank_before_nccl_is_asked():
    places = [["a", "b", "c"], ["a", "b", "a"]]
    said = run_ranks(refusals, 3, places)
    assert said[0] == said[1] == said[2]
    own, shared = said[0]
    assert own == ""
    assert shared.startswith("ranks 0, 2 share GPU a of ")
    assert "resources.gpus_per_rank: 1" in shared
