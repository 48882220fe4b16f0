"""What changes while a run trains: weights, optimiser, average, scaler, guard, position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from contract.recipe import EVALUATION_FIELDS, RunConfig, StepSchedule
from contract.record import Message, parse_record
from workers.tracking.journal import JournalState
from workers.tracking.spool import print_warning
from workers.training.guard import GuardState
from workers.training.optim import build_optimiser
from workers.trial.checkpoints import Snapshot, copied_to_host

# Fields in which a checkpoint and the run that resumes it may differ: they change no number of the
# training.
_FREE_FIELDS = EVALUATION_FIELDS | {
    "data.num_loader_workers",
    "data.cache_gib",
    "loop.cuda_graphs",
    "loop.log_every_steps",
    "loop.checkpoint_every_steps",
    "loop.keep_checkpoints",
}


class SavedState(Message):
    """The JSON part of a checkpoint. A field that an older version did not write has its default.

    run: a RunConfig as nested data; see `check_same_run`. manifests: hashes of the data's
    manifests, by "train" and "val". seconds: in steps, and of these waiting for data.
    """

    run: dict[str, JsonValue]
    manifests: dict[str, str] = {}
    guard: GuardState = GuardState()
    best: float = -1.0
    seconds: tuple[float, float] = (0.0, 0.0)
    journal: JournalState = JournalState()


def saved_state(plain: Mapping[str, JsonValue]) -> SavedState:
    """Raises ValueError of one line if a checkpoint's JSON is not what this version reads."""
    return parse_record(SavedState, plain, "the checkpoint")


def with_journal(snapshot: Snapshot, journal: JournalState) -> Snapshot:
    """A snapshot of the training with what the journal has to keep at the same step."""
    return replace(snapshot, plain={**snapshot.plain, "journal": journal.model_dump()})


@dataclass(frozen=True)
class _SavedTensors:
    """The names in `state.pt`. `optimiser` and `scaler` are torch's own nested state."""

    detector: dict[str, Tensor]
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    average: list[Tensor]
    random: Tensor


class TrainState:
    """The state after `step` finished optimiser steps.

    best: highest value so far of the run's best metric. train_seconds: in steps, of which
    wait_seconds for data. manifests: hashes of the data's manifests, by "train" and "val". ended:
    the checkpoint was the last of its run, and no checkpoint has the evaluation after it.
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
        """Puts everything but the weights back to before the first step."""
        self.optimiser = build_optimiser(self.run.optimiser, self.detector)
        self.scaler = torch.amp.GradScaler(
            _device_type(self.detector), enabled=self.run.loop.precision == "fp16"
        )
        self.average = [p.detach().clone() for p in self.trained] if self.run.loop.ema_decay else []
        self.guard = GuardState()
        self.step = 0
        self.best = -1.0
        self.ended = False

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.detector.parameters() if p.requires_grad]

    @property
    def data_step(self) -> int:
        """The global batch that the next step trains on."""
        # batches that the guard skipped took no step, so that the data runs ahead
        return self.step + self.guard.skipped

    # Every in-place change of the state runs without gradients. With them the average would
    # become a node of the autograd graph, and each step's node would keep the one before.
    @torch.no_grad()
    def update_average(self) -> None:
        if self.average:
            # all parameters in a few launches; torch has no public name for it
            torch._foreach_lerp_(self.average, list(self.trained), 1 - self.run.loop.ema_decay)

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Within the block the detector holds the averaged weights, if the run keeps an average."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    @torch.no_grad()
    def _swap_average(self) -> None:
        # swapped and not copied: the training goes on with its own weights afterwards
        # not strict: a run that keeps no average has an empty list
        for parameter, average in zip(self.trained, self.average, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def snapshot(self) -> Snapshot:
        """A copy on the host, which training does not change any more."""
        tensors = _SavedTensors(
            detector=dict(self.detector.state_dict()),
            optimiser=self.optimiser.state_dict(),
            scaler=self.scaler.state_dict(),
            average=list(self.average),
            random=torch.get_rng_state(),
        )
        plain = SavedState(
            run=self.run.sparse(),
            manifests=self.manifests,
            guard=self.guard,
            best=self.best,
            seconds=(self.train_seconds, self.wait_seconds),
        )
        # a copy: the next step changes the tensors while a thread writes the checkpoint
        return Snapshot(self.step, copied_to_host(vars(tensors)), plain.model_dump())

    def restore(self, snapshot: Snapshot) -> JournalState:
        """Goes back to a checkpoint. Returns what its journal was at the same step.

        Raises ValueError if another configuration or other data wrote the checkpoint.
        """
        # before the first change: a checkpoint that is refused leaves the state as it is
        before = _check_same_training(saved_state(snapshot.plain), self.run, self.manifests)
        self.ended = snapshot.step == before.loop.steps
        return self.take(snapshot)

    @torch.no_grad()
    def take(self, snapshot: Snapshot) -> JournalState:
        """As `restore`, of a training that is known to be the same: its files may lie elsewhere."""
        plain, tensors = saved_state(snapshot.plain), _SavedTensors(**snapshot.tensors)
        self.detector.load_state_dict(tensors.detector)
        self.optimiser.load_state_dict(tensors.optimiser)
        self.scaler.load_state_dict(tensors.scaler)
        # in place: the checkpoint's tensors lie on the CPU
        for average, saved in zip(self.average, tensors.average, strict=True):
            average.copy_(saved)
        torch.set_rng_state(tensors.random)
        self.guard, self.best = plain.guard, plain.best
        self.train_seconds, self.wait_seconds = plain.seconds
        self.step = snapshot.step
        return plain.journal


def check_same_training(
    plain: Mapping[str, JsonValue], run: RunConfig, manifests: Mapping[str, str]
) -> None:
    """Raises ValueError if a checkpoint's JSON is of another configuration or of other data.

    Data counts as other data if its manifest has another hash, even at the same path.
    """
    _check_same_training(saved_state(plain), run, manifests)


def _check_same_training(
    saved: SavedState, run: RunConfig, manifests: Mapping[str, str]
) -> RunConfig:
    before = check_same_run(saved.run, run)
    uris = {"train": run.data.train, "val": run.data.val}
    # the path alone does not say which data it was: somebody may have packed it again
    for name, then in saved.manifests.items():  # older checkpoints have none
        now = manifests.get(name, then)
        if now != then and name == "val":
            # somebody mended it: no number of the training came from it
            print_warning(
                f"data.val: {uris[name]} was packed anew since the checkpoint (manifest "
                f"{then[:12]} then, {now[:12]} now); evaluations before and after differ in data"
            )
        elif now != then:
            raise ValueError(
                f"data.{name}: {uris[name]} is other data than the checkpoint was written on "
                f"(manifest {then[:12]} then, {now[:12]} now); "
                "put the old data back, or start in a new folder"
            )
    return before


def check_same_run(saved: Mapping[str, JsonValue], run: RunConfig) -> RunConfig:
    """The checkpoint's run. Raises ValueError with the first field in which it is not `run`.

    More steps are no other run where no rate depends on their number. Records are compared, not
    their JSON: a field that the saved run does not have counts as its default. Otherwise each new
    field of RunConfig would refuse every older checkpoint.
    """
    try:
        before = parse_record(RunConfig, saved, "the checkpoint's run")
    except ValueError as error:
        raise ValueError(
            f"{error}; another version wrote it: resume with that one, or start in a new folder"
        ) from None
    for path, old, new in _differences(
        before.model_dump(mode="json"), run.model_dump(mode="json"), ""
    ):
        if path in _FREE_FIELDS:
            continue
        more = path == "loop.steps" and run.loop.steps > before.loop.steps
        if more and isinstance(run.schedule, StepSchedule):
            continue
        why = f" (schedule.kind {run.schedule.kind} spreads over all steps)" if more else ""
        raise ValueError(
            f"the checkpoint was written with {path} = {old!r}, this run has {new!r}{why}; "
            "set it back, or start in a new folder"
        )
    return before


def _differences(
    a: JsonValue, b: JsonValue, path: str
) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """(dotted path, value in `a`, value in `b`) where they differ, None for a missing value."""
    if isinstance(a, dict) and isinstance(b, dict):
        # sorted, so that the same difference always gives the same message
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b


def weights_of(detector: nn.Module) -> dict[str, Tensor]:
    """The detector's state on the host, contiguous, as safetensors wants it."""
    return {
        name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()
    }


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type
