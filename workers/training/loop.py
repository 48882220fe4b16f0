"""The training loop. Read it downwards: what it calls returns values, it performs the effects."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Literal, Protocol

import torch
from torch import Tensor

from contract.recipe import LoopConfig, RunConfig, steps_between_evaluations
from model.structures import Batch
from pipelines.load.loader import TrainStep
from workers.tracking.journal import Journal
from workers.tracking.series import Row
from workers.tracking.spool import print_warning
from workers.tracking.system import SystemSampler
from workers.training.evaluate import Scores
from workers.training.graphs import (
    EagerGradients,
    GraphedGradients,
    by_graphs_or_eager,
    own_stream,
)
from workers.training.guard import GuardState, first_bad_step, rolled_back
from workers.training.meter import Meter
from workers.training.optim import base_rate, rate_factor
from workers.training.prefetch import DeviceBatches, on_device
from workers.training.state import TrainState, with_journal
from workers.training.step import (
    Flags,
    Gradients,
    LossSums,
    accumulate_gradients,
    apply_gradients,
    distributed,
)
from workers.training.world import World
from workers.trial.checkpoints import BackgroundWriter, CheckpointStore, step_of
from workers.trial.errors import DivergedError, memory_explained
from workers.trial.flags import FlagReader
from workers.trial.stop import Reason, StopRequest


class Loader(Protocol):
    """`pipelines.load.loader.TrainLoader`, or what a test puts in its place."""

    def __iter__(self) -> Iterator[TrainStep]: ...
    def sample_ids(self, step: int) -> list[int]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What the loop runs on; its caller builds it.

    open_loader: opens the stream of global batches at a given one. evaluate: scores the state, on
    all ranks together; None if somebody asked for a stop meanwhile. start_again: puts a TrainState
    back to its beginning.
    """

    state: TrainState
    open_loader: Callable[[int], Loader]
    evaluate: Callable[[TrainState, Callable[[], bool]], Scores | None]
    checkpoints: CheckpointStore
    journal: Journal
    stop: StopRequest
    start_again: Callable[[TrainState], None]


@dataclass(frozen=True)
class Ending:
    """How the loop ended. scores: of the evaluation after the last step, if there was one."""

    state: Literal["done", "stopped", "preempted"]
    scores: Scores | None


@dataclass(frozen=True)
class _Due:
    read: bool
    log: bool
    checkpoint: bool
    evaluation: bool


def train(run: RunConfig, world: World, parts: Parts) -> Ending:
    """Trains from the given state to the last step, or until somebody asks for a stop.

    Raises DivergedError when the guard may not roll back again.
    """
    with own_stream(run.loop, world.device):
        return _train(run, world, parts)


def _train(run: RunConfig, world: World, parts: Parts) -> Ending:
    loop, state, journal = run.loop, parts.state, parts.journal
    accumulate = _accumulation(run, world, parts)
    state.detector.train()
    writer, meter, flags = BackgroundWriter(), Meter(), FlagReader(world.device)
    system = SystemSampler(world.device)
    scores: Scores | None = None
    gc.collect()
    gc.freeze()  # what is built by now stays: the collector need not walk through it again
    loader, batches = _opened(run, world, parts)
    try:
        # a stop or a kill came after the checkpoint of this step and before its evaluation ended
        if state.step and (state.ended or due(loop, state.step).evaluation):
            scores = parts.evaluate(state, parts.stop.asked)
            if scores is None:
                return Ending(_common_reason(parts.stop, world), None)
        last_end = time.perf_counter()
        while state.step < loop.steps:
            # --- one step ---
            wait_began = time.perf_counter()
            chunks = next(batches)
            wait_s = time.perf_counter() - wait_began
            rate = _rate(run, state)
            gradients, norm = _step(run, world, parts, accumulate, chunks, rate)
            state.step += 1
            step_s, last_end = time.perf_counter() - last_end, time.perf_counter()
            state.train_seconds += step_s
            state.wait_seconds += wait_s
            meter.add(state.step, gradients, norm, {"lr": rate, "step_s": step_s, "wait_s": wait_s})
            # all ranks read the same flags in the same step, so they leave the loop together
            asked = flags.read(gradients.flags)
            now = due(loop, state.step, asked)
            if not now.read:
                continue

            # --- values reach the host ---
            rows = meter.read(world)
            losses = [_guarded_loss(row, loop) for row in rows]
            state.guard, bad = first_bad_step(loop.guard, state.guard, losses)
            journal.rows(rows)
            if bad is not None:
                _roll_back(run, world, parts, writer, rows[bad], loader)
                # the stream goes on elsewhere: at the step before, or past the skipped batches
                batches.close()
                loader.close()
                loader, batches = _opened(run, world, parts)
                accumulate.forget()
                continue
            if now.log:
                _log_system(state.step, system, world, journal)
                journal.progress("training", state.step, rows[-1])
            if now.checkpoint:
                _save(parts, writer, world, wait=bool(asked))
            if asked:
                return Ending(asked, None)
            if now.evaluation:
                journal.progress("evaluating", state.step, rows[-1])
                scores = parts.evaluate(state, parts.stop.asked)
                if scores is None:
                    return Ending(_common_reason(parts.stop, world), None)
                last_end = time.perf_counter()  # the next step's time has no evaluation in it
        return Ending("done", scores)
    finally:
        batches.close()  # first: a copy may still read what the loader's workers wrote
        loader.close()
        accumulate.forget()
        writer.drain()
        gc.unfreeze()


def due(loop: LoopConfig, step: int, asked: Reason = "") -> _Due:
    """What happens after `step` finished steps.

    A checkpoint stands before every evaluation and every end, so that neither is lost.
    """
    last = step == loop.steps
    between = steps_between_evaluations(loop.eval_every_steps, loop.steps)
    evaluation = last or bool(between and step % between == 0)
    checkpoint = evaluation or bool(asked) or step % loop.checkpoint_every_steps == 0
    log = last or step % loop.log_every_steps == 0
    # a checkpoint reads, too: the guard must see every loss before it is saved with the state
    read = log or checkpoint or step % loop.guard.check_every_steps == 0
    return _Due(read, log, checkpoint, evaluation)


def _opened(run: RunConfig, world: World, parts: Parts) -> tuple[Loader, DeviceBatches]:
    """The stream of the steps that are left, and its batches on the device."""
    state = parts.state
    loader = parts.open_loader(state.data_step)
    # `map`, since a generator would hold the step before while it waits for the next one
    chunks = map(attrgetter("batches"), islice(loader, run.loop.steps - state.step))
    return loader, on_device(chunks, world.device)


def _rate(run: RunConfig, state: TrainState) -> float:
    """The learning rate of the next step."""
    full = base_rate(run.optimiser, run.loop.global_batch)
    return full * rate_factor(run.schedule, state.step, run.loop.steps) * state.guard.rate


def _step(
    run: RunConfig,
    world: World,
    parts: Parts,
    accumulate: EagerGradients | GraphedGradients,
    chunks: Sequence[Batch],
    rate: float,
) -> tuple[Gradients, Tensor]:
    """One optimiser step; the losses of its gradients and their norm stay on the device."""
    loop, state = run.loop, parts.state
    torch.manual_seed(_step_seed(run.seed, state.data_step, world.rank))
    with memory_explained([chunk.images for chunk in chunks], world.device):
        # one reduction carries the requests to stop and the counts of the losses
        gradients = accumulate(chunks, parts.stop.flags)
        norm = apply_gradients(
            state.trained,
            state.optimiser,
            state.scaler,
            rate,
            loop.clip_grad_norm,
            accumulate.keeps_gradients,
        )
    state.update_average()
    return gradients, norm


def _save(parts: Parts, writer: BackgroundWriter, world: World, wait: bool) -> None:
    """Rank 0 writes in the background. While it writes one checkpoint, it passes over the next."""
    state, journal, checkpoints = parts.state, parts.journal, parts.checkpoints
    if not world.is_first:
        return
    writer.check()
    # never the last: the run ends with it
    if writer.busy and not wait and state.step != state.run.loop.steps:
        print_warning(
            f"step {state.step}: the checkpoint before is still being written, "
            "this one is passed over"
        )
        return
    # both on this thread, at the same step; only what follows may take long
    snapshot, journal_state = state.snapshot(), journal.state()

    def publish() -> None:
        checkpoints.check_claim()
        checkpoints.publish(with_journal(snapshot, journal_state()))

    writer.submit(publish)
    if wait:
        writer.drain()


def _guarded_loss(row: Row, loop: LoopConfig) -> float:
    """The loss that the guard sees: nan if the gradients were not finite, as the weights now are.

    With fp16 the scaler looks for such gradients itself, and takes no step on them.
    """
    broken = loop.precision != "fp16" and not math.isfinite(row.values["grad_norm"])
    return math.nan if broken else row.values["loss"]


def _roll_back(
    run: RunConfig, world: World, parts: Parts, writer: BackgroundWriter, bad: Row, loader: Loader
) -> None:
    """Puts all ranks back to the last good checkpoint, with the guard's decision in the state."""
    state, guard = parts.state, run.loop.guard
    reached, before = state.step, state.guard
    shown = {n.removeprefix("loss/"): v for n, v in bad.values.items() if n.startswith("loss")}
    shown["gradient norm"] = bad.values["grad_norm"]
    what = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
    sample_ids = loader.sample_ids(bad.step - 1 + before.skipped)
    if before.rollbacks >= guard.max_rollbacks:
        raise DivergedError(
            f"training diverged at step {bad.step} after {before.rollbacks} rollbacks "
            f"({what}; sample ids {sample_ids}); lower the rate, warm up longer or clip gradients"
        )
    writer.drain()  # the checkpoint under way may be the one to go back to
    best = state.best
    # rank 0 chooses for all: others may look at a moment at which they see another checkpoint
    name = world.from_first(_last_good(parts.checkpoints, before) if world.is_first else "")
    if name:
        state.restore(parts.checkpoints.load(name))
    else:
        parts.start_again(state)
    # the best weights are kept already: a worse evaluation must not replace them
    state.best = max(best, state.best)
    state.guard = rolled_back(guard, state.guard, before, state.step, reached)
    parts.journal.rewind(state.step)
    parts.journal.event(
        "rollback",
        bad.step,
        f"{what}; sample ids {sample_ids}; back to step {state.step}, {guard.action}",
    )


def _last_good(checkpoints: CheckpointStore, guard: GuardState) -> str:
    """The newest checkpoint.

    If the last rollback went back to it already, the one before, as long as that is still kept.
    """
    newest = checkpoints.newest()
    if newest and step_of(newest) == guard.returned_to:
        return checkpoints.newest(below=guard.returned_to) or newest
    return newest


def _log_system(step: int, system: SystemSampler, world: World, journal: Journal) -> None:
    samples = world.gather(system.sample())
    journal.metrics(
        step,
        {
            f"system/rank-{rank}/{name}": value
            for rank, sample in enumerate(samples)
            for name, value in sample.items()
        },
    )


def _common_reason(stop: StopRequest, world: World) -> Literal["stopped", "preempted"]:
    """The reason on which all ranks agree, after an evaluation that one of them ended."""
    stopped = world.sum_on_host(torch.tensor(float(stop.reason == "stopped"))).item()
    return "stopped" if stopped else "preempted"


def _accumulation(run: RunConfig, world: World, parts: Parts) -> EagerGradients | GraphedGradients:
    """What computes a step's gradients."""
    loop, state = run.loop, parts.state
    module = distributed(_compiled(LossSums(state.detector), loop), world)

    def accumulate(chunks: Sequence[Batch], flags: Flags) -> Gradients:
        return accumulate_gradients(module, chunks, loop, world, state.scaler, flags)

    return by_graphs_or_eager(accumulate, module, loop, world)


def _compiled(sums: LossSums, loop: LoopConfig) -> LossSums:
    if loop.compile:
        # torch stops compiling after 8 shapes, and a run may have more canvases
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(64, dynamo.recompile_limit)
        sums.compile(dynamic=False)  # shapes are fixed: a few canvases, padded to their size
    return sums


def _step_seed(seed: int, data_step: int, rank: int) -> int:
    """Nothing of ours draws from torch's generator in a step.

    With this seed, whatever else does draws the same numbers after a resume.
    """
    # torch takes 63 bits; the hash of integers is the same in every process
    return hash((seed, data_step, rank)) & 0x7FFF_FFFF_FFFF_FFFF
