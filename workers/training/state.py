"""All that changes while a run trains: weights, optimiser, average, scaler, guard, position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from contract.recipe import RunConfig
from workers.training.guard import GuardState
from workers.training.optim import build_optimiser
from workers.trial.checkpoints import Snapshot, copied_to_host

# Fields that may differ between a checkpoint and the run that resumes it: they change no number of the training.
_FREE_FIELDS = {
    ("data", "num_loader_workers"),
    ("data", "cache_gib"),
    ("loop", "log_every_steps"),
    ("loop", "checkpoint_every_steps"),
    ("loop", "keep_checkpoints"),
    ("loop", "eval_every_steps"),
    ("loop", "eval_batch"),
    ("loop", "best_metric"),
}


class TrainState:
    """The state after `step` finished optimiser steps.

    best: highest value so far of the run's best metric. train_seconds: in steps, of which wait_seconds for data.
    manifests: hashes of the data's manifests, by "train" and "val".
    """

    def __init__(
        self, run: RunConfig, detector: nn.Module, manifests: Mapping[str, str] | None = None
    ) -> None:
        self.run = run
        self.detector = detector
        self.manifests = dict(manifests or {})
        self.train_seconds = self.wait_seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """Everything but the weights as it is before the first step."""
        self.optimiser = build_optimiser(self.run.optimiser, self.detector)
        self.scaler = torch.amp.GradScaler(
            _device_type(self.detector), enabled=self.run.loop.precision == "fp16"
        )
        self.average = [p.detach().clone() for p in self.trained] if self.run.loop.ema_decay else []
        self.guard = GuardState()
        self.step = 0
        self.best = -1.0

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.detector.parameters() if p.requires_grad]

    @property
    def data_step(self) -> int:
        """The global batch that the next step trains on."""
        return self.step + self.guard.skipped

    def update_average(self) -> None:
        if self.average:
            torch._foreach_lerp_(self.average, list(self.trained), 1 - self.run.loop.ema_decay)

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within the block the detector holds the averaged weights, if the run keeps an average."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.trained, self.average, strict=False):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def snapshot(self) -> Snapshot:
        """A copy on the host."""
        tensors = copied_to_host(
            {
                "detector": dict(self.detector.state_dict()),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": list(self.average),
                "random": torch.get_rng_state(),
            }
        )
        plain = {
            "run": self.run.model_dump(mode="json"),
            "manifests": self.manifests,
            "guard": vars(self.guard),
            "best": self.best,
            "seconds": [self.train_seconds, self.wait_seconds],
        }
        return Snapshot(self.step, tensors, plain)

    def restore(self, snapshot: Snapshot) -> None:
        """Raises ValueError if the checkpoint was written by another configuration or on other data."""
        check_same_training(snapshot.plain, self.run, self.manifests)
        self.detector.load_state_dict(snapshot.tensors["detector"])
        self.optimiser.load_state_dict(snapshot.tensors["optimiser"])
        self.scaler.load_state_dict(snapshot.tensors["scaler"])
        for average, saved in zip(self.average, snapshot.tensors["average"], strict=True):
            average.copy_(saved)
        torch.set_rng_state(snapshot.tensors["random"])
        self.guard = GuardState(**snapshot.plain["guard"])
        self.best = snapshot.plain["best"]
        self.train_seconds, self.wait_seconds = snapshot.plain["seconds"]
        self.step = snapshot.step


def check_same_training(
    plain: Mapping[str, Any], run: RunConfig, manifests: Mapping[str, str]
) -> None:
    """Raises ValueError if a checkpoint's plain data is of another configuration, or of other data at the same path."""
    check_same_run(plain["run"], run.model_dump(mode="json"))
    for name, before in plain.get("manifests", {}).items():  # which older checkpoints do not have
        now = manifests.get(name, before)
        if now != before:
            raise ValueError(
                f"data.{name}: {getattr(run.data, name)} is other data than the checkpoint was written on (manifest "
                f"{before[:12]} then, {now[:12]} now); put the old data back, or start in a new folder"
            )


def check_same_run(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError with the first field in which a checkpoint's run differs from the one that resumes it."""
    for path, (before, now) in _differences(saved, wanted, ()):
        if path not in _FREE_FIELDS:
            raise ValueError(
                f"the checkpoint was written with {'.'.join(path)} = {before!r}, this run has {now!r}; "
                "set it back, or start in a new folder"
            )


def _differences(
    a: Any, b: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), (*path, key))
    elif a != b:
        yield path, (a, b)


def weights_of(detector: nn.Module) -> dict[str, Tensor]:
    """The detector's state on the host, contiguous, as safetensors wants it."""
    return {
        name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()
    }


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type
