"""The GPU's matching and sampling kernels: interpreted on the CPU, and compiled for GPUs."""

from __future__ import annotations

import pytest

from tests.model.gpu.without_a_gpu import check

triton = pytest.importorskip("triton", reason="torch came without Triton")

INTERPRETED = """
import torch
from model import matching
from model.gpu import matching as kernels
from model.matching import Rule
from tests.model.batches import random_boxes

def check(rule, *given):
    found, expected = (kind(rule)(*given) for kind in (
        kernels.MatchedSampling, matching.MatchedSampling))
    valid = expected.sample.valid
    assert torch.equal(found.sample.valid, valid)
    assert torch.equal(found.sample.positive, expected.sample.positive)
    assert found.sample.most_positives == expected.sample.most_positives
    for ours, theirs in (
        (found.sample.index, expected.sample.index),
        (found.object_BS, expected.object_BS),
        (found.noise_BS, expected.noise_BS),
    ):
        assert torch.equal(ours[valid], theirs[valid])
        assert not ours[~valid].any()
    return expected.sample.positive.sum(dim=1)

generator = torch.Generator().manual_seed(0)
positives = 0
# boxes, objects, slots: fewer boxes than slots, no object, two programs with a list of many boxes
for boxes, objects, slots in [(1, 1, 4), (70, 3, 16), (1100, 5, 300), (65, 0, 64), (100, 2, 256)]:
    given = random_boxes((1, boxes), boxes, side=60)
    those = random_boxes((2, objects), 1, side=60)
    if objects > 1:  # a box that is an object, and two objects that are one: ties
        those[0, 0], those[1, -1] = given[0, boxes // 2], those[1, 0]
    there = torch.rand(2, objects, generator=generator) < 0.8
    keys = torch.randint(-(2**62), 2**62, (2,), generator=generator)
    anchors = Rule(slots, 0.5, 0.7, 0.3, True, 1)
    positives += check(anchors, given, None, None, those, there, keys)
    own = random_boxes((2, boxes), boxes + 1, side=60)
    eligible = torch.rand(2, boxes, generator=generator) < 0.8
    identity = torch.randint(0, 2**41, (2, boxes), generator=generator)
    rois = Rule(slots, 0.25, 0.5, 0.5, False, 2)
    positives += check(rois, own, eligible, identity, those, there, keys)
assert (positives > 3).all()
nothing = torch.zeros(2, 3, dtype=torch.bool)  # positives outnumber their slots in the next one
check(anchors, given, None, None, random_boxes((2, 3)), nothing, keys)
same = given[:, :1].expand(2, 40, 4)
assert check(Rule(8, 0.5, 0.7, 0.3, True, 1), same, None, None, same[:, :1],
             torch.ones(2, 1, dtype=torch.bool), keys).tolist() == [4, 4]
"""
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from model.gpu import matching
sizes = {"num_boxes": "i32", "num_objects": "i32"}
slots = {**sizes, "slots": "i32", "most_positives": "i32"}
given = {"boxes": "*fp32", "objects": "*fp32", "object_there": "*u8", "zeros": "*i32", **sizes}
flags = dict.fromkeys(("SHARED", "BEST", "ELIGIBLE", "IDENTITY"), True)
kernels = {
    matching._find_highest: (given, {"SHARED": True, "BLOCK": 1024}),
    matching._mark: (
        {**given, "eligible": "*u8", "identity": "*i64", "keys": "*i64", "marks": "*i16",
         "matches": "*i32", "positive_iou": "fp32", "negative_iou": "fp32"},
        {"SEED": 2**63 + 1, **flags, "BLOCK": 1024},
    ),
    matching._collect: (
        {"zeros": "*i32", "marks": "*i16", "candidates": "*i32", **slots}, {"BLOCK": 1024}
    ),
    matching._rank: (
        {"zeros": "*i32", "candidates": "*i32", "matches": "*i32", "identity": "*i64",
         "keys": "*i64", "index": "*i64", "valid": "*u8", "positive": "*u8",
         "chosen_object": "*i64", "noise": "*i64", **slots},
        {"SEED": 2**63 + 1, "IDENTITY": True, "BLOCK": 64, "PARTS": 8},
    ),
}
for kernel, (signature, constants) in kernels.items():
    signatures = {**signature, **dict.fromkeys(constants, "constexpr")}
    source, target = ASTSource(kernel, signatures, constants), GPUTarget("cuda", 90, 32)
    assert compile(source, target=target, options={"enable_fp_fusion": False}).asm["cubin"]
"""


@pytest.mark.parametrize(
    ("program", "interpret"),
    [(INTERPRETED, True), pytest.param(COMPILED, False, marks=pytest.mark.slow)],
)
def test_the_kernels_without_a_gpu(tmp_path, program, interpret):
    check(program, tmp_path, interpret)
