"""Kernels that do not work on a machine are left out, with the reason."""

from __future__ import annotations

import pytest
import torch

from contract.presets import preset
from model.accelerate import kernels
from model.build import build_detector
from model.gpu import suppression, usable
from model.gpu.accelerate import swap
from model.rpn.nms import Suppression


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A machine with a GPU, on which nothing has been tried yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(usable, "KERNELS", ("suppression",))
    monkeypatch.setattr(usable, "tried", {})


def refused() -> bool:
    raise RuntimeError("def _kernel(a):\n    a + 1\n    ^\nFailed to find C compiler")


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (refused, "RuntimeError: Failed to find C compiler"),
        (lambda: False, "it computes other numbers than torch"),
    ],
)
def test_a_kernel_that_fails_is_left_out_and_named(monkeypatch, trial, reason):
    monkeypatch.setattr(suppression, "trial", trial)
    detector = build_detector(preset("tiny"))
    swap(detector)
    assert {type(m) for m in detector.modules() if isinstance(m, Suppression)} == {Suppression}
    assert usable.kernels() == kernels(torch.device("cuda")) == "torch"
    [line] = usable.complaints()
    assert line == f"no Triton kernel for suppression on this GPU, torch's stands in: {reason}"


def test_a_kernel_that_works_is_swapped_in(monkeypatch):
    monkeypatch.setattr(suppression, "trial", lambda: True)
    detector = build_detector(preset("tiny"))
    swap(detector)
    assert not [m for m in detector.modules() if isinstance(m, Suppression)]
    assert usable.kernels().startswith("triton ")
    assert usable.complaints() == []
