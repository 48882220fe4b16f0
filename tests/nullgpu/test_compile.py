"""Inductor compiles for CUDA what it refused once, on the null CUDA."""

from __future__ import annotations

import sys

import pytest

from tests.nullgpu import null_cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not()),
]

PROGRAM = """
import torch
from tests.nullgpu import null_cuda
null_cuda.install()
from model.rpn.network import AnchorSampler

sampler = AnchorSampler(256, 0.5, 0.7, 0.3)

def run(anchors, objects, valid, keys):
    targets = sampler(anchors, objects, valid, keys)
    return targets.sample.index, targets.boxes_xyxy

given = (
    torch.zeros(6000, 4, device="cuda"),
    torch.zeros(2, 5, 4, device="cuda"),
    torch.zeros(2, 5, dtype=torch.bool, device="cuda"),
    torch.zeros(2, dtype=torch.int64, device="cuda"),
)
index, boxes = torch.compile(run, dynamic=False, fullgraph=True)(*given)
assert index.shape == (2, 256) and boxes.shape == (2, 128, 4)
"""


def test_the_anchor_sampler_compiles_whole_for_cuda():
    """Its constants of 64 bits did not: `loop.compile` failed on every GPU."""
    done = null_cuda.run([sys.executable, "-c", PROGRAM])
    assert done.returncode == 0, done.stderr[-3000:]
