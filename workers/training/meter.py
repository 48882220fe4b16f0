"""Per-step values that stay on the device until they are due, and then reach every rank's host."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.tracking.series import Row
from workers.training.step import Gradients
from workers.training.world import World

# N steps since the last reading, T loss terms


class Meter:
    """Collects the steps between two readings."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._host: list[tuple[int, dict[str, float]]] = []

    def add(
        self, step: int, gradients: Gradients, norm: Tensor, host_values: dict[str, float]
    ) -> None:
        """Keeps tensors as they are: reading one here would make the host wait for the device."""
        self._names = gradients.names
        self._losses.append(gradients.losses_T)
        self._norms.append(norm.detach())
        self._host.append((step, host_values))

    def read(self, world: World) -> list[Row]:
        """The rows since the last reading; every rank gets the losses summed over the ranks."""
        if not self._host:
            return []
        # one reduction and one copy for all steps
        losses_NT = world.sum(torch.stack(self._losses)).cpu()
        norms_N = torch.stack(self._norms).cpu().tolist()
        rows = []
        for losses_T, norm, (step, values) in zip(
            losses_NT.tolist(), norms_N, self._host, strict=True
        ):
            terms = {f"loss/{name}": loss for name, loss in zip(self._names, losses_T, strict=True)}
            rows.append(Row(step, {"loss": sum(losses_T), **terms, "grad_norm": norm, **values}))
        self.clear()
        return rows

    def clear(self) -> None:
        self._losses, self._norms, self._host = [], [], []
