"""Rank 0's tracking from beginning to end: spool, shipper, journal, and what a run tells once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import assert_never

import yaml

from contract.attempt import (
    ARTIFACT_FOLDER,
    MLflowTracking,
    NoTracking,
    Outcome,
    Progress,
    RunSpec,
    Tracking,
)
from contract.files import Files
from contract.record import Record as ConfigRecord
from workers.tracking.journal import TrialJournal
from workers.tracking.mlflow_target import TRIAL_TAG, MLflowTarget, flattened
from workers.tracking.spool import Record, Shipper, Spool, print_warning
from workers.trial.checkpoints import FencedError, check_claim

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


def build_target(tracking: Tracking, target: SpoolTarget, storage: Files) -> MLflowTarget | None:
    """None without a tracker: nothing is shipped then, and the records wait in the spool for one."""
    match tracking:
        case NoTracking():
            return None
        case MLflowTracking():
            return MLflowTarget(tracking, target.trial, target.name, storage)
        case _:
            assert_never(tracking)


def spool_folder(spec: RunSpec, storage: Files) -> Path:
    """On this node: in the trial's own folder, or in the cache where that is remote."""
    if storage.local is not None:
        return storage.local / SPOOL_FOLDER
    return Path(spec.cache or tempfile.gettempdir()) / "maskray-spool" / spec.trial


def open_spool(spec: RunSpec, storage: Files) -> tuple[Spool, SpoolTarget]:
    """The trial's spool, taken over from whoever wrote it before, and where its records belong, noted in it.

    An attempt without a tracker leaves them to that of the attempts before.
    """
    spool = Spool(spool_folder(spec, storage))
    files = Files(str(spool.folder))
    tracking = (
        spec.tracking if isinstance(spec.tracking, MLflowTracking) else _tracking_before(files)
    )
    target = SpoolTarget(tracking=tracking, trial=spec.trial, name=spec.name, storage=spec.storage)
    files.write(TARGET_FILE, target.model_dump_json(indent=1).encode())
    return spool, target


def _tracking_before(files: Files) -> Tracking:
    try:
        return SpoolTarget.model_validate_json(files.read(TARGET_FILE)).tracking
    except (FileNotFoundError, ValueError):
        return NoTracking()


class Scribe:
    """Writes what a run tells to its spool, and has it shipped."""

    def __init__(self, spec: RunSpec, storage: Files, show: Callable[[Progress], None]) -> None:
        self._spec, self._storage = spec, storage
        self._spool, target = open_spool(spec, storage)
        window = (
            spec.tracking.step_metrics_every if isinstance(spec.tracking, MLflowTracking) else 50
        )
        loop = spec.run.loop
        self._target = build_target(spec.tracking, target, storage)
        self.journal = TrialJournal(
            self._spool,
            storage,
            spec.attempt,
            loop.steps,
            loop.global_batch,
            window,
            show,
            shipped=self._target is not None,
        )
        self._shipper = (
            Shipper(self._spool, self._target, self.journal.warn) if self._target else None
        )
        self._owing = isinstance(
            target.tracking, MLflowTracking
        )  # to this attempt's tracker, or to one before
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
        self._spool.append(
            {"kind": "params", "values": flattened(spec.run.model_dump(mode="json"))}
        )
        texts = {"config.yaml": yaml.safe_dump(spec.run.model_dump(mode="json"), sort_keys=False)}
        if spec.study_yaml:
            texts["study.yaml"] = spec.study_yaml
        for name, text in texts.items():
            self._storage.write(f"{ARTIFACT_FOLDER}/{name}", text.encode())
            self.journal.artifact(f"{ARTIFACT_FOLDER}/{name}", "")

    def begin(self, tags: Mapping[str, str]) -> None:
        """What is known once the data is open."""
        self._spool.append({"kind": "tags", "values": dict(tags)})

    def flush(self) -> str:
        """Waits for what was told so far to arrive. Returns the tracker's run id, empty if it was never reached."""
        if self._shipper is not None:
            self._shipper.flush(_LAST_SHIPMENT_S["done"])
        return self._target.run_id if self._target else ""

    def finish(self, outcome: Outcome) -> None:
        """Tells how it ended and ships what is left."""
        try:
            for record in ending_records(outcome):
                self._spool.append(record)
            arrived = (
                self._shipper.close(_LAST_SHIPMENT_S[outcome.state])
                if self._shipper
                else not self._owing
            )
            if not arrived:
                self.journal.warn(
                    f'some records could not be shipped; send them later with "maskray sync {self._spool.folder}"'
                )
                self._keep_unshipped()
            self.journal.close()
            self._spool.close()
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


def tell_failure(spec: RunSpec, storage: Files, outcome: Outcome) -> None:
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
    sender = build_target(spec.tracking, target, storage)
    if sender is not None:
        shipper = Shipper(spool, sender, print_warning)
        if not shipper.close(_LAST_SHIPMENT_S[outcome.state]):
            print(f'warning: send the rest later with "maskray sync {spool.folder}"', flush=True)
    spool.close()
