"""What a rank says of its machine, and that no answer of a driver ends a training."""

from __future__ import annotations

import pytest
import torch

from workers.tracking.system import SystemSampler


class NVMLError_NotSupported(Exception):  # noqa: N801, N818 - nvidia-ml-py's own name
    """What a MIG instance answers; nvidia-ml-py derives its errors from Exception alone."""


@pytest.mark.parametrize(
    ("error", "warned"),
    [
        (NVMLError_NotSupported("Not Supported"), "NVML does not say it: Not Supported"),
        (RuntimeError("cuda driver can't be loaded, is cuda enabled?"), "can't be loaded"),
        (ModuleNotFoundError("nvidia-ml-py does not seem to be installed"), ""),
    ],
)
def test_what_nvml_refuses_is_told_once_and_left_out(monkeypatch, capsys, error, warned):
    asked = []

    def utilization(device: torch.device) -> int:
        asked.append(device)
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    sampler = SystemSampler(torch.device("cuda", 0))
    samples = [sampler.sample(), sampler.sample()]
    assert all("gpu_percent" not in sample for sample in samples)
    assert all("gpu_memory_gib" in sample for sample in samples)
    assert len(asked) == 1
    printed = capsys.readouterr().out
    assert printed.count("warning: gpu_percent is left out") == bool(warned)
    assert warned in printed
