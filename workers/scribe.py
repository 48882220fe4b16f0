"""Rank 0's tracking from beginning to end: spool, shipper, journal, and what a run tells once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import assert_never

import yaml

from model.config import Record as ConfigRecord
from workers.checkpoints import FencedError, check_claim
from workers.config import (
    ARTIFACT_FOLDER,
    MLflowTracking,
    NoTracking,
    Outcome,
    Progress,
    RunSpec,
    Tracking,
)
from workers.journal import TrialJournal
from workers.spool import Record, Shipper, Spool
from workers.storage import Storage
from workers.tracking import TRIAL_TAG, MLflowTarget, flattened

SPOOL_FOLDER = "spool"
TARGET_FILE = "target.json"
# how long the end of a run waits for a tracker that answers: short where a node is about to go, and the run goes on
_LAST_SHIPMENT_S = {"done": 60.0, "failed": 60.0, "stopped": 5.0, "preempted": 5.0}
_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "preempted": "KILLED"}


class SpoolTarget(ConfigRecord):
    """Where a spool's records belong: kept in it, so that it can be shipped by another process."""

    tracking: Tracking
    trial: str
    name: str
    storage: str


class NoTarget:
    """Nobody is told; what the spool keeps is enough."""

    run_id = ""

    def send(self, records: Sequence[Record]) -> None:
        pass


def build_target(target: SpoolTarget, storage: Storage) -> MLflowTarget | NoTarget:
    match target.tracking:
        case NoTracking():
            return NoTarget()
        case MLflowTracking():
            return MLflowTarget(target.tracking, target.trial, target.name, storage)
        case _:
            assert_never(target.tracking)


def spool_folder(spec: RunSpec, storage: Storage) -> Path:
    """On this node: in the trial's own folder, or in the cache where that is remote."""
    if storage.local is not None:
        return storage.local / SPOOL_FOLDER
    return Path(spec.cache or tempfile.gettempdir()) / "maskray-spool" / spec.trial


def open_spool(spec: RunSpec, storage: Storage) -> tuple[Spool, SpoolTarget]:
    """The trial's spool, taken over from whoever wrote it before, and where its records belong, noted in it."""
    spool = Spool(spool_folder(spec, storage))
    target = SpoolTarget(tracking=spec.tracking, trial=spec.trial, name=spec.name, storage=spec.storage)
    Storage(str(spool.folder)).write(TARGET_FILE, target.model_dump_json(indent=1).encode())
    return spool, target


class Scribe:
    """Writes what a run tells to its spool, and has it shipped."""

    def __init__(self, spec: RunSpec, storage: Storage, show: Callable[[Progress], None]) -> None:
        self._spec, self._storage = spec, storage
        self._spool, target = open_spool(spec, storage)
        tracked = isinstance(spec.tracking, MLflowTracking)
        window = spec.tracking.step_metrics_every if isinstance(spec.tracking, MLflowTracking) else 50
        loop = spec.run.loop
        self.journal = TrialJournal(self._spool, storage, spec.attempt, loop.steps, loop.global_batch, window, show)
        self._target = build_target(target, storage)
        self._shipper = Shipper(self._spool, self._target, self.journal.warn)
        self._tracked, self._closed = tracked, False
        self._tell_start()

    def _tell_start(self) -> None:
        spec = self._spec
        self._spool.append({"kind": "status", "at": _now_ms(), "status": "RUNNING"})
        tags = {
            TRIAL_TAG: spec.trial,
            "maskray.study": spec.study,
            "maskray.seed": str(spec.run.seed),
            "maskray.attempt": str(spec.attempt),
            "maskray.ranks": str(spec.ranks),
            **{f"maskray.arm.{factor}": level for factor, level in spec.arm.items()},
            **spec.tags,
        }
        self._spool.append({"kind": "tags", "values": tags})
        self._spool.append({"kind": "params", "values": flattened(spec.run.model_dump(mode="json"))})
        texts = {"config.yaml": yaml.safe_dump(spec.run.model_dump(mode="json"), sort_keys=False)}
        if spec.study_yaml:
            texts["study.yaml"] = spec.study_yaml
        for name, text in texts.items():
            self._storage.write(f"{ARTIFACT_FOLDER}/{name}", text.encode())
            self.journal.artifact(f"{ARTIFACT_FOLDER}/{name}", "")

    def begin(self, tags: Mapping[str, str]) -> None:
        """What is known once the data is open."""
        self._spool.append({"kind": "tags", "values": dict(tags)})

    def close(self, outcome: Outcome) -> str:
        """Tells how it ended and ships what is left. Returns the tracker's run id, empty if it was never reached."""
        if not self._closed:
            self._closed = True
            for record in ending_records(outcome):
                self._spool.append(record)
            if not self._shipper.close(_LAST_SHIPMENT_S[outcome.state]):
                self.journal.warn(
                    f'some records could not be shipped; send them later with "maskray sync {self._spool.folder}"'
                )
                self._keep_unshipped()
            self.journal.close()
            self._spool.close()
        return self._target.run_id

    def finish(self, outcome: Outcome) -> None:
        """Closes, whatever happened before."""
        try:
            self.close(outcome)
        except (OSError, RuntimeError) as error:
            self.journal.warn(f"tracking could not be closed: {error}")

    def _keep_unshipped(self) -> None:
        """A remote trial folder gets a copy of the spool: this node may not come back."""
        if self._storage.local is None:
            for path in self._spool.folder.iterdir():
                self._storage.write(f"{SPOOL_FOLDER}/{path.name}", path.read_bytes())


def ending_records(outcome: Outcome) -> list[Record]:
    tags: dict[str, str] = {"maskray.state": outcome.state}
    if outcome.error:
        tags |= {"maskray.error": outcome.error, "maskray.error_class": outcome.error_class}
    return [
        {"kind": "tags", "values": tags},
        {"kind": "status", "at": _now_ms(), "status": _STATUS[outcome.state]},
    ]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def tell_failure(spec: RunSpec, storage: Storage, outcome: Outcome) -> None:
    """For the driver of an attempt whose rank 0 may be dead: makes sure that the tracker learns the reason.

    Of an attempt that a newer one has replaced it learns nothing.
    """
    try:
        check_claim(storage, spec.attempt)
    except FencedError as error:
        print(f"warning: {error}", flush=True)
        return
    spool, target = open_spool(spec, storage)
    for record in ending_records(outcome):
        spool.append(record)
    shipper = Shipper(spool, build_target(target, storage), lambda text: print(f"warning: {text}", flush=True))
    if not shipper.close(_LAST_SHIPMENT_S[outcome.state]):
        print(f'warning: send the rest later with "maskray sync {spool.folder}"', flush=True)
    spool.close()
