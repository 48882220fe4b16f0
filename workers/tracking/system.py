"""What one rank uses of its machine."""

from __future__ import annotations

import psutil
import torch

from contract.words import one_line
from workers.tracking.spool import print_warning

_GIB = 2**30


class SystemSampler:
    """Measures the use of processor and memory since the sample before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asks_nvml = device.type == "cuda"
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
                **self._utilisation(),
            }
        return values

    def _utilisation(self) -> dict[str, float]:
        """Empty where NVML does not answer; it is asked no second time then."""
        if not self._asks_nvml:
            return {}
        try:
            return {"gpu_percent": float(torch.cuda.utilization(self._device))}
        except ModuleNotFoundError:  # nvidia-ml-py is not a requirement
            pass
        # Its errors have a class of their own, and torch adds others. A MIG instance has no
        # utilisation, a container may lack the right to ask: no reason to end a training.
        except Exception as error:  # noqa: BLE001
            print_warning(f"gpu_percent is left out, NVML does not say it: {one_line(error)}")
        self._asks_nvml = False
        return {}
