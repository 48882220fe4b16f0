"""The ranks' stop flags, read from the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from workers.trial.stop import Reason, reason_of

# On a GPU the host reads a flag this many steps late: by then its copy has arrived without a wait.
_LAG_STEPS = 2


class FlagReader:
    """Reads flags from the device without waiting for it: on a GPU, those of two steps before."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waiting: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def read(self, flags: Tensor) -> Reason:
        """Takes this step's flags; returns the reason, the same on all ranks in the same step."""
        if not self._on_gpu:
            return reason_of(flags.tolist())
        # pinned, or the copy would wait for the device
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((host, event))
        if len(self._waiting) <= _LAG_STEPS:
            return ""
        oldest, copied = self._waiting.popleft()
        copied.synchronize()
        return reason_of(oldest.tolist())
