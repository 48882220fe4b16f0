"""One attempt of one trial on one rank: builds the parts, runs the loop, leaves the trial's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from contract.attempt import ARTIFACT_FOLDER, RESULT_FILE, Outcome, Progress, Result, RunSpec
from contract.files import Files
from contract.words import one_line
from model.cpu.accelerate import kernels
from pipelines.shards.dataset import Dataset
from workers.tracking.journal import NOTHING, Journal, SilentJournal
from workers.tracking.scribe import Scribe
from workers.tracking.spool import print_warning
from workers.training.build import eval_loader, initial_detector, open_datasets, train_loader_opener
from workers.training.evaluate import Scores, best_metric, evaluate_detector
from workers.training.loop import Ending, Parts, train
from workers.training.pictures import comparison
from workers.training.state import TrainState, check_same_training, weights_of
from workers.training.step import check_precision, slow_precision
from workers.training.world import World, host_name
from workers.trial.causes import (
    Cause,
    DivergedError,
    cause_of,
    common_cause,
    record_cause,
    write_outcome,
)
from workers.trial.checkpoints import CheckpointStore, FencedError
from workers.trial.stop import StopRequest


def run_trial(
    spec: RunSpec,
    world: World,
    stop: StopRequest,
    show: Callable[[Progress], None],
    claimed: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs the attempt to its end, whichever it is; never raises an Exception. Every rank returns its outcome.

    Leaves `outcome.json` in the attempt's folder, and `result.json` when the trial is done. `claimed` is called on
    rank 0 once the trial's folder is this attempt's.
    """
    try:
        storage = Files(spec.storage)
    except ValueError as error:
        return Outcome(state="failed", error_class="person", error=str(error))
    scribe: Scribe | None = None
    try:
        store = CheckpointStore(
            storage, spec.attempt, spec.run.loop.keep_checkpoints, print_warning
        )
        if world.is_first:
            store.check_claim()
        check_shared(storage, spec.attempt, world)
        with refused_together(world):
            given = _open(spec, world, store)
        if (
            world.is_first
        ):  # from here on the folder is ours: an attempt that still trains in it ends
            store.claim()
            claimed()
            scribe = Scribe(spec, storage, show)
        outcome = _run(spec, world, stop, storage, store, scribe, given)
    except Exception as error:  # noqa: BLE001 - whatever it is, the attempt ends with it and says so
        outcome = _failed(spec, world, storage, error)
        if scribe is not None:
            outcome = outcome.model_copy(update={"events": scribe.journal.events})
    if scribe is not None:
        write_outcome(
            storage, spec.attempt, outcome
        )  # before the tracker: it may be slow, and others wait to read it
        scribe.finish(outcome)
    return outcome


def _failed(spec: RunSpec, world: World, storage: Files, error: Exception) -> Outcome:
    own = cause_of(error, world.rank)
    explained = own.error_class == "person" or isinstance(error, DivergedError | FencedError)
    print(f"rank {world.rank} ends: {own.error}" if explained else own.details, flush=True)
    try:
        record_cause(storage, spec.attempt, own)
        cause = common_cause(storage, spec.attempt, own)
        outcome = _failed_with(cause, world)
        write_outcome(storage, spec.attempt, outcome)
    except (OSError, RuntimeError) as unwritten:  # the storage itself may be what failed
        print_warning(f"the reason could not be written to {storage.uri}: {unwritten}")
        outcome = _failed_with(own, world)
    return outcome


def _failed_with(cause: Cause, world: World) -> Outcome:
    named = world.size > 1 and cause.error_class != "person"
    return Outcome(
        state="failed",
        error_class=cause.error_class,
        error=f"rank {cause.rank}: {cause.error}" if named else cause.error,
        rank=cause.rank,
    )


@contextmanager
def refused_together(world: World) -> Iterator[None]:
    """What a person got wrong, found in the block by some rank, is raised at its end on every rank."""
    own: Exception | None = None
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        own = error
    told = world.from_first([text for text in world.gather(one_line(own) if own else "") if text])
    if own is not None:
        raise own
    if told:
        raise ValueError(told[0])


@dataclass(frozen=True)
class _Given:
    train_data: Dataset
    val_data: Dataset
    detector: nn.Module

    @property
    def manifests(self) -> dict[str, str]:
        return {"train": self.train_data.manifest.hash, "val": self.val_data.manifest.hash}


def _open(spec: RunSpec, world: World, store: CheckpointStore) -> _Given:
    """Data and detector, once all that a person can get wrong is checked; leaves the trial's folder as it is."""
    run = spec.run
    if world.device.type == "cpu":
        torch.set_num_threads(max(int(spec.cpus_per_rank), 1))
    check_precision(run.loop, world.device)
    if world.is_first and (slow := slow_precision(run.loop, world.device)):
        print_warning(slow)
    best_metric(run)
    if run.loop.global_batch < world.size:
        raise ValueError(
            f"loop.global_batch is {run.loop.global_batch} for {world.size} ranks; each needs an image"
        )
    given = _Given(*open_datasets(run, spec.cache), initial_detector(run))
    name = store.newest() if world.is_first else ""
    if name:
        check_same_training(store.plain(name), run, given.manifests)
    return given


def _run(
    spec: RunSpec,
    world: World,
    stop: StopRequest,
    storage: Files,
    store: CheckpointStore,
    scribe: Scribe | None,
    given: _Given,
) -> Outcome:
    run = spec.run
    journal: Journal = scribe.journal if scribe is not None else SilentJournal()
    journal.progress("starting", 0, None)
    if scribe is not None:
        scribe.begin(
            {f"maskray.manifest.{name}": digest for name, digest in given.manifests.items()}
        )
    state = TrainState(run, given.detector.to(world.device), given.manifests)
    name = world.from_first(store.newest() if world.is_first else "")
    if name:
        snapshot = store.load(name)
        state.restore(snapshot)
        if scribe is not None:
            scribe.journal.restore(snapshot.plain["journal"], state.step)
            scribe.journal.event(
                "resume", state.step, f"attempt {spec.attempt} on {world.size} rank(s)"
            )
        del snapshot
    elif scribe is not None:
        scribe.journal.restore(NOTHING, 0)
    with closing(eval_loader(run, given.val_data, world)) as batches:
        reporter = _Reporter(spec, storage, store, journal, batches.dataset)

        def evaluate(now: TrainState, stopping: Callable[[], bool]) -> Scores | None:
            with now.evaluated_weights():
                scores = evaluate_detector(run.model, now.detector, batches, world, stopping)
                batches.close()
                if scores is not None and world.is_first:
                    reporter.evaluated(now, scores)
            return scores

        def start_again(now: TrainState) -> None:
            now.detector.load_state_dict(initial_detector(run).state_dict())
            now.begin()

        parts = Parts(
            state,
            train_loader_opener(run, given.train_data, world),
            evaluate,
            store,
            journal,
            stop,
            start_again,
        )
        ending = train(run, world, parts)
    outcome = Outcome(state=ending.state, step=state.step)
    if scribe is not None:
        outcome = outcome.model_copy(update={"events": scribe.journal.events})
        if ending.state == "done":
            _finish(spec, world, storage, store, scribe, state, ending)
    return outcome


def _finish(
    spec: RunSpec,
    world: World,
    storage: Files,
    store: CheckpointStore,
    scribe: Scribe,
    state: TrainState,
    ending: Ending,
) -> None:
    """Rank 0 leaves the last weights, the series and `result.json`."""
    assert ending.scores is not None
    journal = scribe.journal
    journal.progress("finishing", state.step, None)
    store.check_claim()
    with state.evaluated_weights():
        digest = _write_weights(storage, state.detector, "weights-last")
    artifacts = _artifact_paths(ending.scores, storage)
    journal.finish_series(artifacts["series"])
    for path in (artifacts["weights/last"], artifacts["series"]):
        journal.artifact(path, "")
    total_s = max(state.train_seconds, 1e-9)
    rates = {
        "images_per_s": state.step * spec.run.loop.global_batch / total_s,
        "data_wait_fraction": state.wait_seconds / total_s,
        "train_seconds": state.train_seconds,
    }
    result = Result(
        metrics={**ending.scores.metrics, **rates},
        per_class=ending.scores.per_class,
        step=state.step,
        attempt=spec.attempt,
        world_size=world.size,
        weights_sha256=digest,
        kernels=kernels(world.device),
        artifacts=artifacts,
        mlflow_run_id=scribe.flush(),
        events=journal.events,
    )
    store.check_claim()
    storage.write(RESULT_FILE, result.model_dump_json(indent=1).encode())


def _artifact_paths(scores: Scores, storage: Files) -> dict[str, str]:
    paths = {
        f"detections/{kind}": f"{ARTIFACT_FOLDER}/detections/{kind}.json" for kind in scores.results
    }
    pictures = storage.names(f"{ARTIFACT_FOLDER}/pictures")
    if pictures:
        paths["picture/last"] = f"{ARTIFACT_FOLDER}/pictures/{pictures[-1]}"
    if storage.exists(f"{ARTIFACT_FOLDER}/weights-best.safetensors"):
        paths["weights/best"] = f"{ARTIFACT_FOLDER}/weights-best.safetensors"
    paths["weights/last"] = f"{ARTIFACT_FOLDER}/weights-last.safetensors"
    paths["series"] = f"{ARTIFACT_FOLDER}/series.parquet"
    paths["config"] = f"{ARTIFACT_FOLDER}/config.yaml"
    return paths


class _Reporter:
    """Rank 0's account of each evaluation: metrics, a picture, the best weights, at the end the detections."""

    def __init__(
        self,
        spec: RunSpec,
        storage: Files,
        store: CheckpointStore,
        journal: Journal,
        dataset: Dataset,
    ) -> None:
        self._loop, self._storage, self._store = spec.run.loop, storage, store
        self._best_metric = best_metric(spec.run)
        self._journal, self._dataset = journal, dataset

    def evaluated(self, state: TrainState, scores: Scores) -> None:
        self._store.check_claim()
        self._journal.metrics(state.step, scores.metrics)
        for kind in ("bbox/AP", "segm/AP", "keypoints/AP"):
            per_class = scores.per_class.get(kind, {})
            self._journal.metrics(
                state.step, {f"{kind}/{_metric_name(c)}": v for c, v in per_class.items()}
            )
        picture = f"{ARTIFACT_FOLDER}/pictures/step-{state.step:08d}.png"
        self._storage.write(picture, comparison(self._dataset, scores.results))
        self._journal.artifact(picture, "pictures")
        best = scores.metrics[self._best_metric]
        if best > state.best:
            state.best = best
            _write_weights(self._storage, state.detector, "weights-best")
            self._journal.artifact(f"{ARTIFACT_FOLDER}/weights-best.safetensors", "")
        if state.step == self._loop.steps:
            for kind, results in scores.results.items():
                path = f"{ARTIFACT_FOLDER}/detections/{kind}.json"
                self._storage.write(path, json.dumps(results).encode())
                self._journal.artifact(path, "detections")


def _write_weights(storage: Files, detector: nn.Module, name: str) -> str:
    data = safetensors_bytes(weights_of(detector))
    storage.write(f"{ARTIFACT_FOLDER}/{name}.safetensors", data)
    return hashlib.sha256(data).hexdigest()


def _metric_name(category: str) -> str:
    return re.sub(r"[^\w\-. ]", "_", category)


def check_shared(storage: Files, attempt: int, world: World) -> None:
    """Raises ValueError on every rank if some rank does not see what rank 0 writes to the trial's folder."""
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
