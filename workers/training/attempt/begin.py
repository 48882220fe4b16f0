"""How an attempt begins: data and detector are opened, and the steps so far are taken up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from contract.attempt import RunSpec
from contract.files import Files
from contract.fit import same_data
from contract.words import one_line
from model.weights import Loaded
from pipelines.shards.dataset import Dataset
from workers.pretrained.weights import weights_source
from workers.tracking.journal import JournalState
from workers.tracking.spool import print_warning
from workers.training import arithmetic
from workers.training.attempt.report import SERIES, Attempt
from workers.training.build import initial_detector, open_datasets
from workers.training.evaluate import best_metric
from workers.training.state import TrainState, check_same_training
from workers.training.world import World, host_name
from workers.trial.checkpoints import CheckpointStore, step_of


@dataclass(frozen=True)
class Inputs:
    train_data: Dataset
    val_data: Dataset
    detector: nn.Module

    @property
    def manifests(self) -> dict[str, str]:
        return {"train": self.train_data.manifest.hash, "val": self.val_data.manifest.hash}


@contextmanager
def refused_together(world: World) -> Iterator[None]:
    """What some rank refuses in the block, every rank refuses at its end.

    Without it the others would wait for that rank until the process group times out.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        own = error
    refusals = world.gather(one_line(own) if own else "")
    refusals = world.from_first([text for text in refusals if text])
    if own is not None:
        raise own
    if refusals:
        raise ValueError(refusals[0])


def open_inputs(spec: RunSpec, world: World, store: CheckpointStore) -> Inputs:
    """Data and detector, once everything that a person can get wrong is checked.

    Leaves the trial's folder as it is: another attempt may be training in it.
    """
    run = spec.run
    # ranks that share a machine must share its cores: OpenMP threads spin at barriers
    if world.device.type == "cpu":
        torch.set_num_threads(max(int(spec.cpus_per_rank), 1))
    arithmetic.check_precision(run.loop, world.device)
    arithmetic.set_arithmetic(run.loop, world.device)
    for doubt in arithmetic.doubts(run.loop, world.device) if world.is_first else []:
        print_warning(doubt)
    best_metric(run)  # for its error: a misspelt metric must not show at the first evaluation
    if run.loop.global_batch < world.size:
        raise ValueError(
            f"loop.global_batch is {run.loop.global_batch} for {world.size} ranks; "
            "each needs an image"
        )

    def tell(loaded: Loaded) -> None:
        if world.is_first and loaded.heads_are_fresh:
            print(f"{weights_source(run.model.weights)}: {loaded.line()}", flush=True)

    inputs = Inputs(*open_datasets(run, spec.cache), initial_detector(run, world.device, tell))
    if world.is_first and (doubt := same_data(run, *inputs.manifests.values())):
        print_warning(doubt)
    name = store.newest() if world.is_first else ""
    if name:
        check_same_training(store.plain(name), run, inputs.manifests)
    return inputs


def check_shared(storage: Files, attempt: int, world: World) -> None:
    """Raises ValueError on every rank if some rank does not see what rank 0 writes."""
    if world.size == 1:
        return
    probe = f"attempts/{attempt}/shared-{world.size}"
    if world.is_first:
        storage.write(probe, host_name().encode())
    world.barrier()
    blind = sorted(set(world.gather("" if storage.exists(probe) else host_name())) - {""})
    blind = world.from_first(blind)
    if world.is_first:
        storage.delete(probe)
    if blind:
        raise ValueError(
            f"storage {storage.uri} is not shared: {', '.join(blind)} cannot see it; "
            "a run over several nodes needs a shared folder or a URI (s3://...)"
        )


def go_on(attempt: Attempt, state: TrainState) -> None:
    """From the newest checkpoint, else from a training that is shared, else from the first step."""
    spec, world, store, journal = attempt.spec, attempt.world, attempt.store, attempt.journal
    # rank 0 chooses for all: others may look at a moment at which they see another checkpoint
    name = world.from_first(store.newest() if world.is_first else "")
    if name:
        journal.restore(state.restore(store.load(name)), state.step)
        journal.event("resume", state.step, f"attempt {spec.attempt} on {world.size} rank(s)")
        # until the next line of the log the step would be 0, as of a run that has lost its work
        journal.progress("training", state.step, None)
        return
    shared = world.from_first(_trained(spec) if world.is_first else "")
    if shared:
        state.take(_other_store(spec).load(shared))
        state.best = -1.0  # by another evaluation
    elif spec.trained and world.is_first:
        print_warning(
            f"{spec.trained}: has no checkpoint of step {spec.run.loop.steps}; "
            "this run trains from the first step"
        )
    journal.restore(JournalState(), state.step)
    if shared:
        journal.event("trained", state.step, f"shares the training in {spec.trained}")
        series = Files(spec.trained).read_part(SERIES) if world.is_first else None
        if series is not None:
            attempt.storage.write(SERIES, series)


def _trained(spec: RunSpec) -> str:
    """The other trial's checkpoint of the last step; empty if there is none any more."""
    name = _other_store(spec).newest() if spec.trained else ""
    return name if name and step_of(name) == spec.run.loop.steps else ""


def _other_store(spec: RunSpec) -> CheckpointStore:
    """To read from: it is never claimed."""
    keep = spec.run.loop.keep_checkpoints
    return CheckpointStore(Files(spec.trained), spec.attempt, keep, print_warning)
