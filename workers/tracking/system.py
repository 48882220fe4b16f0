"""What one rank uses of its machine."""

from __future__ import annotations

import psutil
import torch

_GIB = 2**30


class SystemSampler:
    """Measures the use of processor and memory since the sample before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock

    def sample(self) -> dict[str, float]:
        """By metric name: percent, and GiB."""
        values = {
            "cpu_percent": self._process.cpu_percent(),
            "memory_gib": self._process.memory_info().rss / _GIB,
            "node_memory_percent": psutil.virtual_memory().percent,
        }
        if self._device.type == "cuda":
            # the peak, not the present use: memory runs out at the peak
            values |= {
                "gpu_memory_gib": torch.cuda.max_memory_allocated(self._device) / _GIB,
                "gpu_memory_reserved_gib": torch.cuda.memory_reserved(self._device) / _GIB,
                **_utilisation(self._device),
            }
        return values


def _utilisation(device: torch.device) -> dict[str, float]:
    try:
        return {"gpu_percent": float(torch.cuda.utilization(device))}
    except ModuleNotFoundError:  # nvidia-ml-py is not a requirement
        return {}
