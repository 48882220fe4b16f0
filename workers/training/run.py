"""One attempt of one trial on one rank: builds the parts, runs the loop, leaves the files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from contract.attempt import MAX_IMAGES_OF_MATCHES, Outcome, Progress, RunSpec
from contract.files import Files, FullDiskError, UnreachableStoreError
from workers.tracking.journal import SilentJournal, open_journal
from workers.tracking.spool import print_warning
from workers.training.attempt.begin import (
    Inputs,
    check_shared,
    go_on,
    open_inputs,
    refused_together,
)
from workers.training.attempt.report import (
    Attempt,
    Reporter,
    computing_of,
    finish,
    objects_of,
    write_categories,
)
from workers.training.build import eval_loader, initial_detector, train_loader_opener
from workers.training.evaluate import Scores, evaluate_detector, num_processes
from workers.training.loop import Parts, train
from workers.training.state import TrainState
from workers.training.world import World, check_own_gpus
from workers.trial.causes import Cause, common_cause, record_cause, write_outcome
from workers.trial.checkpoints import WHEN_FULL, CheckpointStore, FencedError
from workers.trial.errors import DivergedError, cause_of
from workers.trial.stop import StopRequest


def run_trial(
    spec: RunSpec,
    world: World,
    stop: StopRequest,
    show: Callable[[Progress], None],
    claimed: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs the attempt to its end, whichever it is. Every rank returns its outcome.

    Never raises an Exception. Leaves `outcome.json` in the attempt's folder, and `result.json` when
    the trial is done. `claimed` is called on rank 0 once the trial's folder is this attempt's.
    """
    storage = Files(spec.storage, when_full=WHEN_FULL)
    try:
        storage.path()  # raises where nothing can open the URI: no cause can be written there
    except ValueError as error:
        return Outcome(state="failed", error_class="person", error=str(error))
    attempt = Attempt(
        spec,
        world,
        storage,
        CheckpointStore(storage, spec.attempt, spec.run.loop.keep_checkpoints, print_warning),
        SilentJournal(),
    )
    try:
        if world.is_first:
            attempt.store.check_claim()
        check_shared(storage, spec.attempt, world)
        check_own_gpus(world)
        with refused_together(world):
            inputs = open_inputs(spec, world, attempt.store)
        # from here on the folder is ours: an attempt that still trains in it ends
        if world.is_first:
            attempt.store.claim()
            claimed()
            attempt = replace(attempt, journal=open_journal(spec, storage, show))
        outcome = _run(attempt, stop, inputs)
    except Exception as error:  # noqa: BLE001 - whatever it is, the attempt ends with it and says so
        outcome = _failed(attempt, error)
    outcome = outcome.model_copy(update={"events": attempt.journal.events})
    attempt.journal.finish(outcome)
    return outcome


def _run(attempt: Attempt, stop: StopRequest, inputs: Inputs) -> Outcome:
    spec, world, store, journal = attempt.spec, attempt.world, attempt.store, attempt.journal
    run = spec.run
    computing = computing_of(attempt)
    journal.progress("starting", 0, None)
    journal.begin(
        {f"maskray.manifest.{name}": hash for name, hash in inputs.manifests.items()}
        | {"maskray.objects": objects_of(run, inputs.train_data, world)}
    )
    state = TrainState(run, inputs.detector, inputs.manifests)
    go_on(attempt, state)
    with closing(eval_loader(run, inputs.val_data, world)) as batches:
        if world.is_first:
            write_categories(attempt.storage, batches.dataset)
        reporter = Reporter(attempt, batches.dataset)

        def evaluate(now: TrainState, stopping: Callable[[], bool]) -> Scores | None:
            last = now.step == run.loop.steps
            with now.evaluated_weights():
                # before the scores: whatever becomes of the evaluation, the training stands
                if world.is_first and last:
                    reporter.trained(now)
                scores = evaluate_detector(
                    run.model,
                    now.detector,
                    batches,
                    world,
                    stopping,
                    run.loop.eval_precision,
                    num_processes(run, world),
                    run.loop.eval_boundary,
                    # the report tells the noise of a small validation set from them
                    last and len(batches.dataset.rows()) <= MAX_IMAGES_OF_MATCHES,
                )
                # its workers hold memory that the training needs until the next evaluation
                batches.close()
                if scores is not None and world.is_first:
                    reporter.evaluated(now, scores)
            # The others wait here, on the host, as long as rank 0 needs. In the next step they
            # would wait in NCCL, whose time-out is that of a step.
            world.barrier()
            return scores

        # for a loss that was bad before the first checkpoint
        def start_again(now: TrainState) -> None:
            now.detector.load_state_dict(initial_detector(run).state_dict())
            now.begin()

        parts = Parts(
            state,
            train_loader_opener(run, inputs.train_data, world),
            evaluate,
            store,
            journal,
            stop,
            start_again,
        )
        ending = train(run, world, parts)
    if world.is_first and ending.state == "done":
        finish(attempt, state, ending, reporter.digest, computing)
    return Outcome(state=ending.state, step=state.step)


def _failed(attempt: Attempt, error: Exception) -> Outcome:
    """The outcome on which all ranks agree, written by each: rank 0 may be the one that is dead."""
    spec, world, storage = attempt.spec, attempt.world, attempt.storage
    own = cause_of(error, world.rank)
    explained = own.error_class == "person" or isinstance(
        error, DivergedError | FencedError | FullDiskError | UnreachableStoreError
    )
    # a traceback helps nobody with an error that its line explains
    print(f"rank {world.rank} ends: {own.error}" if explained else own.details, flush=True)
    try:
        record_cause(storage, spec.attempt, own)
        outcome = _failed_with(common_cause(storage, spec.attempt, own), world)
        write_outcome(storage, spec.attempt, outcome)
    except (OSError, RuntimeError) as unwritten:  # the storage itself may be what failed
        print_warning(f"the reason could not be written to {storage.uri}: {unwritten}")
        outcome = _failed_with(own, world)
    return outcome


def _failed_with(cause: Cause, world: World) -> Outcome:
    # a person's mistake is the same on every rank, so no rank is named
    named = world.size > 1 and cause.error_class != "person"
    return Outcome(
        state="failed",
        error_class=cause.error_class,
        error=f"rank {cause.rank}: {cause.error}" if named else cause.error,
        rank=cause.rank,
        avoid_node=cause.gpu_broke,
    )
