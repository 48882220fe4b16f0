"""The GPU's suppression kernels: interpreted on the CPU, and compiled for GPUs not at hand."""

from __future__ import annotations

import pytest
import torch

from model.rpn.nms import nms, nms_listwise
from tests.model.batches import random_boxes
from tests.model.gpu.without_a_gpu import check

triton = pytest.importorskip("triton", reason="torch came without Triton")

INTERPRETED = """
import torch
from model.rpn.nms import nms_listwise
from model.gpu.suppression import nms_in_two_launches
from tests.model.batches import random_boxes
for seed, (lists, boxes) in enumerate([(3, 1), (2, 31), (2, 32), (3, 33), (2, 70), (1, 0), (0, 5)]):
    given = random_boxes((lists, boxes), seed, side=40)
    valid = torch.rand(lists, boxes, generator=torch.Generator().manual_seed(seed)) < 0.9
    for threshold in (0.2, 0.5, 0.8):
        found, expected = (f(given, valid, threshold) for f in (nms_in_two_launches, nms_listwise))
        assert torch.equal(found, expected), (lists, boxes, threshold)
chain = torch.tensor([[[0.0, 0, 10, 10], [4.0, 0, 14, 10], [8.0, 0, 18, 10], [8.0, 0, 18, 10]]])
kept = nms_in_two_launches(chain, torch.ones(1, 4, dtype=torch.bool), 0.3)
assert kept.tolist() == [[True, False, True, False]]
row = torch.arange(70.0)[:, None] * torch.tensor([2.0, 0, 2, 0]) + torch.tensor([0.0, 0, 3, 9])
kept = nms_in_two_launches(row[None], torch.ones(1, 70, dtype=torch.bool), 0.1)  # a long chain
assert kept[0].tolist() == [box % 2 == 0 for box in range(70)]
empty = torch.zeros(1, 2, 4)  # overlap nothing, themselves neither
assert nms_in_two_launches(empty, torch.ones(1, 2, dtype=torch.bool), 0.3).all()
"""
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from model.gpu import suppression
sizes = {"num_boxes": "i32", "num_words": "i32"}
kernels = {
    suppression._overlaps: (
        {"boxes": "*fp32", "overlaps": "*i32", **sizes, "max_iou": "fp32"},
        {"BITS": 32},
    ),
    suppression._stay: (
        {"overlaps": "*i32", "valid": "*u8", "keep": "*u8", **sizes},
        {"BITS": 32, "WORDS": 64},
    ),
}
for kernel, (signature, constants) in kernels.items():
    for capability in (80, 90):
        signatures = {**signature, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, signatures, constants)
        target = GPUTarget("cuda", capability, 32)
        built = compile(source, target=target, options={"enable_fp_fusion": False})
        assert built.asm["cubin"]
"""


@pytest.mark.parametrize(
    ("program", "interpret"),
    [(INTERPRETED, True), pytest.param(COMPILED, False, marks=pytest.mark.slow)],
)
def test_the_kernels_without_a_gpu(tmp_path, program, interpret):
    check(program, tmp_path, interpret)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("boxes", [1, 33, 2000, 12000])
def test_a_gpu_suppresses_what_the_cpu_does(boxes):
    lists = random_boxes((3, boxes), boxes, side=300)
    valid = torch.rand(3, boxes, generator=torch.Generator().manual_seed(boxes)) < 0.9
    assert torch.equal(nms(lists.cuda(), valid.cuda(), 0.7).cpu(), nms_listwise(lists, valid, 0.7))
