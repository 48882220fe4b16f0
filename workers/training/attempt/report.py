"""What an attempt leaves: what each evaluation found, the weights, and the result at its end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

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
    RESULT_FILE,
    Result,
    RunSpec,
)
from contract.files import Files
from contract.fit import flip_in_words
from contract.metrics import BOUNDARY, category_keys, renamed
from contract.model import KeypointBranch, MaskBranch
from contract.recipe import RunConfig
from model.accelerate import complaints, kernels
from pipelines.load.sample import mirrored_keypoints
from pipelines.shards.dataset import Dataset
from workers.tracking.journal import Journal
from workers.tracking.spool import print_warning
from workers.training import arithmetic
from workers.training.evaluate import Scores, best_metric
from workers.training.loop import Ending
from workers.training.pictures import comparison
from workers.training.state import TrainState, weights_of
from workers.training.world import World, host_name
from workers.trial.checkpoints import CheckpointStore

SERIES = f"{ARTIFACT_FOLDER}/series.parquet"
_PICTURES = f"{ARTIFACT_FOLDER}/pictures"
_PER_CLASS = ("bbox/AP", "segm/AP", "keypoints/AP")  # what the tracker gets of each category


@dataclass(frozen=True)
class Attempt:
    """What the parts of an attempt work with. journal: silent until the folder is claimed."""

    spec: RunSpec
    world: World
    storage: Files
    store: CheckpointStore
    journal: Journal


def write_categories(storage: Files, dataset: Dataset) -> None:
    """What the labels mean, for predictions of these weights where the data are not."""
    records = {record["id"]: record for record in dataset.manifest.categories}
    kept = [records[number] for number in dataset.category_ids]
    storage.write(CATEGORIES_FILE, json.dumps(kept).encode())


def objects_of(run: RunConfig, data: Dataset, world: World) -> str:
    """Which objects train and which do not, in one line that rank 0 prints.

    Where images with keypoints are mirrored it also prints which of them change places.
    """
    trained = data.for_training(run.data.filter)
    line = trained.index.census(trained.selection).line(
        masks=isinstance(run.model.mask, MaskBranch),
        keypoints=isinstance(run.model.keypoints, KeypointBranch),
    )
    if world.is_first:
        print(line, flush=True)
        if isinstance(run.model.keypoints, KeypointBranch) and run.data.flip_probability > 0:
            count = run.model.keypoints.num_keypoints
            partners = mirrored_keypoints(run.data, trained.categories, count)
            names = next(c.keypoints for c in trained.categories if c.keypoints)
            print(flip_in_words(names, partners), flush=True)
    return line


@dataclass(frozen=True)
class Computing:
    """What the ranks compute with, and in which precision; more than one where they differ."""

    kernels: str
    precision: str
    platform: str


def computing_of(attempt: Attempt) -> Computing:
    """What all ranks say; on a GPU rank 0 prints it, with each kernel that some node lacks."""
    world, device = attempt.world, attempt.world.device
    own = Computing(
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
    return Computing(all_kernels, all_precisions, all_platforms)


def _platform(device: torch.device) -> str:
    """What moves the last bits of a run beside our kernels."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {arithmetic.gpu_name(device)}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, CPU with {instructions}, {torch.get_num_threads()} threads"


class Reporter:
    """Rank 0's account of each evaluation: metrics, a picture, the best weights.

    After the last step the detections, too.
    """

    def __init__(self, attempt: Attempt, dataset: Dataset) -> None:
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


def finish(
    attempt: Attempt, state: TrainState, ending: Ending, digest: str, computing: Computing
) -> None:
    """Rank 0 leaves the series and `result.json`. digest: of the last weights, already there."""
    assert ending.scores is not None
    spec, storage, journal = attempt.spec, attempt.storage, attempt.journal
    journal.progress("finishing", state.step, None)
    attempt.store.check_claim()
    journal.finish_series(SERIES)
    for path in (LAST_WEIGHTS, SERIES):
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
    if storage.exists(SERIES):
        paths["series"] = SERIES
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
