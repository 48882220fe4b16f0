"""Doubled maps and their gradients against torch's interpolation."""

from __future__ import annotations

import pytest
import torch

from model.branches import keypoint
from model.gpu.doubling import Doubling


@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchs_interpolation(sides, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, *sides, generator=generator).to(dtype).requires_grad_()
    ours, theirs = Doubling()(maps), keypoint.Doubling()(maps)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, theirs, **close)
    upstream = torch.randn(ours.shape, generator=generator).to(dtype)
    one, other = (torch.autograd.grad(values, maps, upstream) for values in (ours, theirs))
    torch.testing.assert_close(one, other, **close)
