"""A small detector and a stream without files: with them the loop itself is tested in moments."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from contract.attempt import Progress
from contract.files import Files
from contract.recipe import RunConfig
from model.structures import Batch, LossTerm
from pipelines.load.loader import TrainStep
from pipelines.load.order import chunks, rank_slice
from tests.builders import tiny_run
from workers.tracking.journal import Journal, JournalState, SilentJournal, TrialJournal
from workers.tracking.records import TrackingRecord
from workers.tracking.shipper import NoShipper
from workers.tracking.spool import Spool
from workers.training.evaluate import Scores
from workers.training.loop import Ending, Loader, Parts, train
from workers.training.state import TrainState
from workers.training.world import World
from workers.trial.checkpoints import BackgroundWriter, CheckpointStore
from workers.trial.stop import StopRequest


def small_run(**loop: Any) -> RunConfig:
    """A dozen steps of six images with momentum, clipping and a checkpoint every four."""
    settings = {
        "steps": 12,
        "global_batch": 6,
        "checkpoint_every_steps": 4,
        "log_every_steps": 2,
        **loop,
    }
    return tiny_run({f"loop.{name}": value for name, value in settings.items()})


def make_batch(images: Tensor, ids: Tensor) -> Batch:
    count = len(ids)
    sizes = torch.tensor([list(images.shape[2:])] * count)
    return Batch(
        images=images,
        sizes=sizes,
        original_sizes=sizes,
        sample_ids=ids,
        noise_keys=ids,
        boxes_xyxy=torch.zeros(count, 0, 4),
        labels=torch.zeros(count, 0, dtype=torch.int64),
        valid=torch.zeros(count, 0, dtype=torch.bool),
        mask_crops=torch.zeros(count, 0, 0, 0, dtype=torch.uint8),
        keypoints=torch.zeros(count, 0, 0, 3),
        proposals_xyxy=torch.zeros(count, 0, 4),
    )


class FakeLoader:
    """Global batch s is drawn from s alone. `visit` sees every step before it is handed out."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        start: int,
        visit: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._run, self._world, self._start, self._visit = run, world, start, visit

    def sample_ids(self, step: int) -> list[int]:
        return [step * 100 + k for k in range(self._run.loop.global_batch)]

    def __iter__(self) -> Iterator[TrainStep]:
        step = self._start
        mine = rank_slice(self._run.loop.global_batch, self._world.rank, self._world.size)
        while True:
            self._visit(step)
            noise = torch.Generator().manual_seed(step)
            ids = torch.tensor(self.sample_ids(step))
            images = torch.randint(0, 256, (len(ids), 3, 8, 8), generator=noise, dtype=torch.uint8)
            images, ids = images[mine], ids[mine]
            parts = chunks(len(ids), self._run.loop.max_images_per_forward)
            yield TrainStep(step, 0, [make_batch(images[part], ids[part]) for part in parts])
            step += 1

    def close(self) -> None:
        pass


class FakeDetector(nn.Module):
    """Two losses. Few samples count for one of them, so only global counts give the right mean."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 3)
            self.norm = nn.GroupNorm(2, 6)
            self.wide = nn.Linear(6, 40_000)  # more than one bucket's first mebibyte would hold
            self.head = nn.Linear(6, 2)
        self.scale = 1.0

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        features = self.norm(self.conv(batch.images.float() / 255)).relu().mean((2, 3))
        errors = (self.head(features) - (batch.sample_ids % 7)[:, None] / 7).square().sum(1)
        spread = self.wide(features).square().mean(1)
        counts = self.counts(batch)
        rare = (batch.sample_ids % 3 == 0).float()
        return {
            "common": LossTerm(errors.sum() * self.scale, counts["common"], 1.0),
            "rare": LossTerm((spread * rare).sum(), counts["rare"], 0.5),
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "common": torch.tensor(float(len(batch))),
            "rare": (batch.sample_ids % 3 == 0).float().sum(),
        }


class PatientWriter(BackgroundWriter):
    """The loop waits for it, so that it passes over no checkpoint, however slow the disk is."""

    busy = False


@dataclass
class Trial:
    """A finished piece of training and the parts that it was done with."""

    ending: Ending
    state: TrainState
    journal: Any

    @property
    def digest(self) -> str:
        return weights_digest(self.state.detector)


def weights_digest(detector: nn.Module) -> str:
    data = b"".join(value.numpy().tobytes() for _, value in sorted(detector.state_dict().items()))
    return hashlib.sha256(data).hexdigest()


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


class HeldShipper(NoShipper):
    """Ships nothing, as to a tracker that is down: a checkpoint carries what waits."""

    def __init__(self, spool: Spool) -> None:
        super().__init__(owed=True)
        self._spool = spool

    def unsent(self) -> list[TrackingRecord]:
        return [record for _, record in self._spool.unsent(100_000)]


def trial_journal(
    spool: Spool,
    storage: Files,
    attempt: int,
    run: RunConfig,
    window_steps: int = 2,
    show: Callable[[Progress], None] = lambda progress: None,
) -> TrialJournal:
    """Rank 0's journal, whose records wait in the spool."""
    loop, shipper = run.loop, HeldShipper(spool)
    return TrialJournal(
        spool, shipper, storage, attempt, loop.steps, loop.global_batch, window_steps, show
    )


def fake_trial(
    folder: Path,
    run: RunConfig,
    *,
    world: World | None = None,
    attempt: int = 1,
    storage: Files | None = None,
    detector: nn.Module | None = None,
    stop: StopRequest | None = None,
    visit: Callable[[int], None] = lambda step: None,
    evaluate: Callable[[TrainState, Callable[[], bool]], Scores | None] | None = None,
    open_loader: Callable[[int], Loader] | None = None,
    writer: type[BackgroundWriter] = PatientWriter,
) -> Trial:
    """Trains the fake detector in `folder` as `workers.training.run` trains a real one.

    It goes on from the newest checkpoint there.
    """
    world, storage = world or alone(), storage or Files(str(folder))
    state = TrainState(run, detector or FakeDetector(run.seed))
    store = CheckpointStore(storage, attempt, run.loop.keep_checkpoints, lambda text: None)
    journal: Journal = SilentJournal()
    if world.is_first:
        store.claim()
        journal = trial_journal(Spool(folder / "spool"), storage, attempt, run)

    def start_again(now: TrainState) -> None:
        now.detector.load_state_dict(FakeDetector(run.seed).state_dict())
        now.begin()

    parts = Parts(
        state=state,
        open_loader=open_loader or (lambda start: FakeLoader(run, world, start, visit)),
        evaluate=evaluate or (lambda now, stopping: Scores({"bbox/AP": 0.5}, {}, {})),
        checkpoints=store,
        journal=journal,
        stop=stop or StopRequest(),
        start_again=start_again,
    )
    try:
        name = world.from_first(store.newest() if world.is_first else "")
        journal.restore(state.restore(store.load(name)) if name else JournalState(), state.step)
        with patch("workers.training.loop.BackgroundWriter", writer):
            return Trial(train(run, world, parts), state, journal)
    finally:
        if isinstance(journal, TrialJournal):
            journal.close()


# --- death at a chosen moment ---


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingStorage(Files):
    """Kills its process in the middle of the n-th file that it writes below `checkpoints/`."""

    def __init__(self, uri: str, at_write: int) -> None:
        super().__init__(uri)
        self._left = at_write

    @contextmanager
    def replacing(self, path: str) -> Iterator[Any]:
        with super().replacing(path) as sink:
            if path.startswith("checkpoints/") and "claim" not in path:
                self._left -= 1
                if self._left == 0:
                    sink.write(b"half a")
                    sink.flush()  # type: ignore[attr-defined]
                    die()
            yield sink
