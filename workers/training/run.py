"""One attempt of one trial on one rank: builds the parts, runs the loop, leaves the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from contract.attempt import (
    ARTIFACT_FOLDER,
    BEST_WEIGHTS,
    CATEGORIES_FILE,
    CONFIG_FILE,
    LAST_WEIGHTS,
    MATCHES,
    MAX_IMAGES_OF_MATCHES,
    RESULT_FILE,
    Outcome,
    Progress,
    Result,
    RunSpec,
)
from contract.files import Files, FullDiskError, UnreachableStoreError
from contract.fit import same_data
from contract.metrics import BOUNDARY, category_keys, renamed
from contract.model import KeypointBranch, MaskBranch
from contract.recipe import RunConfig
from contract.words import one_line
from model.accelerate import complaints, kernels
from model.weights import Loaded
from pipelines.shards.dataset import Dataset
from workers.pretrained.weights import weights_source
from workers.tracking.journal import Journal, JournalState, SilentJournal, open_journal
from workers.tracking.spool import print_warning
from workers.training import arithmetic
from workers.training.build import eval_loader, initial_detector, open_datasets, train_loader_opener
from workers.training.evaluate import (
    Scores,
    best_metric,
    evaluate_detector,
    num_processes,
)
from workers.training.loop import Ending, Parts, train
from workers.training.pictures import comparison
from workers.training.state import TrainState, check_same_training, weights_of
from workers.training.world import World, check_own_gpus, host_name
from workers.trial.causes import (
    Cause,
    DivergedError,
    cause_of,
    common_cause,
    record_cause,
    write_outcome,
)
from workers.trial.checkpoints import WHEN_FULL, CheckpointStore, FencedError, step_of
from workers.trial.stop import StopRequest

_SERIES = f"{ARTIFACT_FOLDER}/series.parquet"
_PICTURES = f"{ARTIFACT_FOLDER}/pictures"
_PER_CLASS = ("bbox/AP", "segm/AP", "keypoints/AP")  # what the tracker gets of each category


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
    attempt = _Attempt(
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
            inputs = _open(spec, world, attempt.store)
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


@dataclass(frozen=True)
class _Attempt:
    """What everything below works with. journal: silent until the folder is claimed."""

    spec: RunSpec
    world: World
    storage: Files
    store: CheckpointStore
    journal: Journal


# --- how it begins ---


@dataclass(frozen=True)
class _Inputs:
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


def _open(spec: RunSpec, world: World, store: CheckpointStore) -> _Inputs:
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

    inputs = _Inputs(*open_datasets(run, spec.cache), initial_detector(run, world.device, tell))
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


# --- the run ---


def _run(attempt: _Attempt, stop: StopRequest, inputs: _Inputs) -> Outcome:
    spec, world, store, journal = attempt.spec, attempt.world, attempt.store, attempt.journal
    run = spec.run
    computing = _computing(attempt)
    journal.progress("starting", 0, None)
    journal.begin(
        {f"maskray.manifest.{name}": hash for name, hash in inputs.manifests.items()}
        | {"maskray.objects": _objects(run, inputs.train_data, world)}
    )
    state = TrainState(run, inputs.detector, inputs.manifests)
    _go_on(attempt, state)
    with closing(eval_loader(run, inputs.val_data, world)) as batches:
        if world.is_first:
            _write_categories(attempt.storage, batches.dataset)
        reporter = _Reporter(attempt, batches.dataset)

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
        _finish(attempt, state, ending, reporter.digest, computing)
    return Outcome(state=ending.state, step=state.step)


def _go_on(attempt: _Attempt, state: TrainState) -> None:
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
        series = Files(spec.trained).read_part(_SERIES) if world.is_first else None
        if series is not None:
            attempt.storage.write(_SERIES, series)


def _trained(spec: RunSpec) -> str:
    """The other trial's checkpoint of the last step; empty if there is none any more."""
    name = _other_store(spec).newest() if spec.trained else ""
    return name if name and step_of(name) == spec.run.loop.steps else ""


def _other_store(spec: RunSpec) -> CheckpointStore:
    """To read from: it is never claimed."""
    keep = spec.run.loop.keep_checkpoints
    return CheckpointStore(Files(spec.trained), spec.attempt, keep, print_warning)


def _write_categories(storage: Files, dataset: Dataset) -> None:
    """What the labels mean, for predictions of these weights where the data are not."""
    records = {record["id"]: record for record in dataset.manifest.categories}
    kept = [records[number] for number in dataset.category_ids]
    storage.write(CATEGORIES_FILE, json.dumps(kept).encode())


def _objects(run: RunConfig, data: Dataset, world: World) -> str:
    """Which objects train and which do not, in one line that rank 0 prints."""
    trained = data.for_training(run.data.filter)
    line = trained.index.census(trained.selection).line(
        masks=isinstance(run.model.mask, MaskBranch),
        keypoints=isinstance(run.model.keypoints, KeypointBranch),
    )
    if world.is_first:
        print(line, flush=True)
    return line


@dataclass(frozen=True)
class _Computing:
    """What the ranks compute with, and in which precision; more than one where they differ."""

    kernels: str
    precision: str
    platform: str


def _computing(attempt: _Attempt) -> _Computing:
    """What all ranks say; on a GPU rank 0 prints it, with each kernel that some node lacks."""
    world, device = attempt.world, attempt.world.device
    own = _Computing(
        kernels(device), arithmetic.in_words(attempt.spec.run.loop, device), _platform(device)
    )
    said = world.gather((own, [f"{host_name()}: {text}" for text in complaints(device)]))
    every = [one for one, _ in said]
    all_kernels = "; ".join(dict.fromkeys(one.kernels for one in every))
    all_precisions = "; ".join(dict.fromkeys(one.precision for one in every))
    if world.is_first and device.type == "cuda":
        # once for a node, however many ranks it has
        for complaint in dict.fromkeys(text for _, texts in said for text in texts):
            print_warning(complaint)
        name = arithmetic.gpu_name(device)
        print(f"{world.size} x {name}: {all_precisions}; kernels {all_kernels}", flush=True)
    all_platforms = "; ".join(dict.fromkeys(one.platform for one in every))
    return _Computing(all_kernels, all_precisions, all_platforms)


def _platform(device: torch.device) -> str:
    """What moves the last bits of a run beside our kernels."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {arithmetic.gpu_name(device)}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, CPU with {instructions}, {torch.get_num_threads()} threads"


class _Reporter:
    """Rank 0's account of each evaluation: metrics, a picture, the best weights.

    After the last step the detections, too.
    """

    def __init__(self, attempt: _Attempt, dataset: Dataset) -> None:
        self._storage, self._store = attempt.storage, attempt.store
        self._journal, self._dataset = attempt.journal, dataset
        self._loop = attempt.spec.run.loop
        self._best_metric = best_metric(attempt.spec.run)
        self._told_names = False
        self.digest = ""  # of the last weights, once they are written

    def trained(self, state: TrainState) -> None:
        """After the last step, and before its evaluation."""
        self._store.check_claim()
        self.digest = _write_weights(self._storage, LAST_WEIGHTS, state.detector)

    def evaluated(self, state: TrainState, scores: Scores) -> None:
        self._store.check_claim()  # a newer attempt writes to the same artifacts
        self._journal.metrics(state.step, scores.metrics)
        keys = self._category_keys(scores)
        for kind in _PER_CLASS:
            per_class = scores.per_class.get(kind, {})
            self._journal.metrics(
                state.step, {f"{kind}/{keys[c]}": value for c, value in per_class.items()}
            )
        picture = f"{_PICTURES}/step-{state.step:08d}.png"
        self._storage.write(picture, comparison(self._dataset, scores.results))
        self._journal.artifact(picture, "pictures")
        best = scores.metrics[self._best_metric]
        if best > state.best:
            state.best = best
            _write_weights(self._storage, BEST_WEIGHTS, state.detector)
            self._journal.artifact(BEST_WEIGHTS, "")
        # once, at the end: the detections of a whole validation set are a large file
        if state.step == self._loop.steps:
            for kind, results in scores.results.items():
                path = _detections(kind)
                self._storage.write(path, json.dumps(results).encode())
                self._journal.artifact(path, "detections")
            for kind, matches in scores.matches.items():
                self._storage.write(_matches(kind), matches.file())

    def _category_keys(self, scores: Scores) -> dict[str, str]:
        keys = category_keys({c for kind in _PER_CLASS for c in scores.per_class.get(kind, ())})
        words = renamed(keys)
        if words and not self._told_names:
            print_warning(f"the tracker cannot take every category's name; it shows {words}")
        self._told_names = True
        return keys


# --- how it ends ---


def _finish(
    attempt: _Attempt, state: TrainState, ending: Ending, digest: str, computing: _Computing
) -> None:
    """Rank 0 leaves the series and `result.json`. digest: of the last weights, already there."""
    assert ending.scores is not None
    spec, storage, journal = attempt.spec, attempt.storage, attempt.journal
    journal.progress("finishing", state.step, None)
    attempt.store.check_claim()
    journal.finish_series(_SERIES)
    for path in (LAST_WEIGHTS, _SERIES):
        if storage.exists(path):  # a shared training may have left no series
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
        world_size=attempt.world.size,
        weights_sha256=digest,
        kernels=computing.kernels,
        precision=computing.precision,
        platform=computing.platform,
        artifacts=_artifact_paths(ending.scores, storage),
        mlflow_run_id=journal.run_id(),
        events=journal.events,
    )
    # waiting for the tracker may have taken long enough for a newer attempt to begin
    attempt.store.check_claim()
    storage.write(RESULT_FILE, result.model_dump_json(indent=1).encode())


def _artifact_paths(scores: Scores, storage: Files) -> dict[str, str]:
    """Paths relative to the trial's folder, by what they hold."""
    paths = {f"detections/{kind}": _detections(kind) for kind in scores.results}
    pictures = storage.names(_PICTURES)
    if pictures:
        paths["picture/last"] = f"{_PICTURES}/{pictures[-1]}"
    # a metric of -1, where there is nothing to evaluate, chooses no weights
    if storage.exists(BEST_WEIGHTS):
        paths["weights/best"] = BEST_WEIGHTS
    if storage.exists(_SERIES):
        paths["series"] = _SERIES
    for kind in (*scores.results, BOUNDARY):
        if storage.exists(_matches(kind)):
            paths[MATCHES.format(kind=kind)] = _matches(kind)
    return paths | {"weights/last": LAST_WEIGHTS, "config": CONFIG_FILE}


def _detections(kind: str) -> str:
    return f"{ARTIFACT_FOLDER}/detections/{kind}.json"


def _matches(kind: str) -> str:
    return f"{ARTIFACT_FOLDER}/{MATCHES.format(kind=kind)}.npz"


def _write_weights(storage: Files, path: str, detector: nn.Module) -> str:
    """Returns their SHA-256."""
    data = safetensors_bytes(weights_of(detector))
    storage.write(path, data)
    return hashlib.sha256(data).hexdigest()


def _failed(attempt: _Attempt, error: Exception) -> Outcome:
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
