"""The account of a run: rank 0 writes it to the spool, the series, the progress file, the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import yaml

from contract.attempt import (
    ARTIFACT_FOLDER,
    PROGRESS_FILE,
    Event,
    MLflowTracking,
    Outcome,
    Phase,
    Progress,
    RunSpec,
)
from contract.files import Files
from contract.record import Message
from workers.tracking.latest_file import LatestFile
from workers.tracking.mlflow_tracker import TRIAL_TAG, flattened
from workers.tracking.records import (
    Artifact,
    Held,
    Metrics,
    Params,
    Rewind,
    Status,
    Tags,
    TrackingRecord,
)
from workers.tracking.series import Row, SeriesParts
from workers.tracking.shipper import AnyShipper, start_shipper
from workers.tracking.spool import SPOOL_FOLDER, Spool, open_spool, print_warning
from workers.trial.causes import write_outcome
from workers.trial.checkpoints import FencedError, check_claim

# How long the end of a run waits for a tracker that answers. A run that is stopped or preempted
# waits only a little: its node may be about to go, and the next attempt ships the rest.
_LAST_SHIPMENT_S, _HURRIED_SHIPMENT_S = 60.0, 5.0
_WINDOW_STEPS = 50  # of a run without a tracker, which may get one later


class JournalState(Message):
    """What a checkpoint carries of a journal.

    window: the rows that are not in a point yet. tail: the records that were not shipped yet.
    """

    window: tuple[Row, ...] = ()
    tail: tuple[TrackingRecord, ...] = ()
    events: tuple[Event, ...] = ()


class SilentJournal:
    """The silent twin, of every rank but the first: each record exists once."""

    @property
    def events(self) -> list[Event]:
        return []

    def begin(self, tags: Mapping[str, str]) -> None:
        pass

    def restore(self, state: JournalState, step: int) -> None:
        pass

    def rows(self, rows: Sequence[Row]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def event(self, kind: str, step: int, text: str) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def artifact(self, path: str, folder: str) -> None:
        pass

    def progress(self, phase: Phase, step: int, row: Row | None) -> None:
        pass

    def state(self) -> Callable[[], JournalState]:
        return JournalState

    def finish_series(self, path: str) -> None:
        pass

    def run_id(self) -> str:
        return ""

    def finish(self, outcome: Outcome) -> None:
        pass


class TrialJournal:
    """Rank 0's journal. The tracker gets means over `window_steps`; the series keeps every step.

    Nothing that the loop calls here takes long or fails. `restore` comes before the first row, and
    `finish` last.
    """

    def __init__(
        self,
        spool: Spool,
        shipper: AnyShipper,
        storage: Files,
        attempt: int,
        steps: int,
        global_batch: int,
        window_steps: int,
        show: Callable[[Progress], None],
    ) -> None:
        self._spool, self._shipper, self._storage = spool, shipper, storage
        self._attempt, self._steps = attempt, steps
        self._global_batch, self._window_steps = global_batch, window_steps
        self._series = SeriesParts(storage)
        self._window: list[Row] = []
        self._held = Held()  # what earlier attempts spooled
        self._show = show
        self._progress_file = LatestFile(
            storage, PROGRESS_FILE, lambda: check_claim(storage, attempt), print_warning
        )
        self._step_seconds: list[float] = []
        self.events: list[Event] = []

    # --- what the loop says ---

    def begin(self, tags: Mapping[str, str]) -> None:
        """tags: what is known once the data is open."""
        self._spool.append(Tags(values=dict(tags)))

    def rows(self, rows: Sequence[Row]) -> None:
        self._series.add(rows)
        for row in rows:
            self._window.append(row)
            # windows end at multiples, not after so many rows: a resumed run has the same windows
            if row.step % self._window_steps == 0 or row.step == self._steps:
                self.metrics(row.step, _window_means(self._window, self._global_batch))
                self._window = []
        if rows:
            self._step_seconds = [row.values["step_s"] for row in rows]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if values:  # a model without masks has no per-class metrics of masks
            self._append_new(Metrics(at=_now_ms(), step=step, values=dict(values)))

    def event(self, kind: str, step: int, text: str) -> None:
        event = Event(at=time.time(), kind=kind, step=step, text=text)
        self.events.append(event)
        count = sum(e.kind == kind for e in self.events)
        # numbered, because a tag replaces an earlier one of its name
        tag = f"maskray.event.{kind}.{count}"
        self._spool.append(Tags(values={tag: f"step {step}: {text}"}))
        print(f"{kind} at step {step}: {text}", flush=True)

    def rewind(self, step: int) -> None:
        """Training goes back to `step`: the points after it come again, with other values."""
        self._spool.append(Rewind(step=step))
        self._held.rewind(step)
        self._window = [row for row in self._window if row.step <= step]
        self._series.rewind(step)

    def artifact(self, path: str, folder: str) -> None:
        """path: of a file in the trial's folder. folder: where the tracker shows it."""
        self._spool.append(Artifact(path=path, folder=folder))

    def progress(self, phase: Phase, step: int, row: Row | None) -> None:
        times = self._step_seconds  # since the last reading: the rate of now, not of the whole run
        mean_s = sum(times) / len(times) if times else None
        progress = Progress(
            attempt=self._attempt,
            step=step,
            steps=self._steps,
            phase=phase,
            loss=row.values["loss"] if row else None,
            images_per_s=self._global_batch / mean_s if mean_s else None,
            seconds_left=mean_s * (self._steps - step) if mean_s else None,
            updated_at=time.time(),
        )
        self._progress_file.put(progress.model_dump_json(indent=1).encode())
        self._show(progress)

    # --- across restarts ---

    def state(self) -> Callable[[], JournalState]:
        """What a checkpoint of this step carries, so that no restart leaves a gap or a double.

        It serves after a kill and after the loss of this node's disk. The loop's thread only notes
        what there is; the function that it gets back reads and writes the files, on any thread.
        """
        # copies: the loop's thread goes on while another thread writes the checkpoint
        rows, window, events = self._series.take(), tuple(self._window), tuple(self.events)

        def read() -> JournalState:
            self._series.write_part(rows)
            return JournalState.model_construct(
                window=window, tail=tuple(self._shipper.unsent()), events=events
            )

        return read

    def restore(self, state: JournalState, step: int) -> None:
        """Goes on at `step`. Points that the spool already holds are not spooled again.

        state: of the checkpoint; an empty one if there is none. Even then earlier attempts may
        have spooled points, which this attempt reaches again.
        """
        self._held = Held(self._spool.records())
        for record in state.tail:
            self._append_new(record)
        # again, with the tail; it also has points of `step` itself, whose evaluation may have been
        # spooled and is done again
        self._held = Held(self._spool.records())
        self._window, self.events = list(state.window), list(state.events)
        self._series.rewind(step)

    def _append_new(self, record: TrackingRecord) -> None:
        new = self._held.new_part(record)
        if new is not None:
            self._spool.append(new)

    # --- the end ---

    def finish_series(self, path: str) -> None:
        """Writes the series of all steps as the one file `path`."""
        self._series.write_part(self._series.take())
        self._series.join(path)

    def run_id(self) -> str:
        """The tracker's run id, empty if the tracker was never reached.

        Waits for the records so far to arrive: the result names a run that exists.
        """
        self._shipper.flush(_LAST_SHIPMENT_S)
        return self._shipper.run_id

    def finish(self, outcome: Outcome) -> None:
        """Writes and spools how the attempt ended, ships what is left and closes the files."""
        # before the tracker, which may be slow: others wait to read it
        write_outcome(self._storage, self._attempt, outcome)
        try:
            self._spool.append(*_ending_records(outcome))
            if not self._shipper.close(_patience_s(outcome)):
                print_warning(
                    f"some records could not be shipped ({self._shipper.lacks()}); "
                    f'send them later with "maskray sync {self._spool.folder}"'
                )
                self._keep_unshipped()
            if refused := self._spool.num_refused:
                print_warning(
                    f"the tracker refused {refused} records for good, kept in {self._spool.folder}"
                )
            self.close()
        except (OSError, RuntimeError) as error:
            # the outcome stands already: what tracking failed at must not change it
            print_warning(f"tracking could not be closed: {error}")

    def _keep_unshipped(self) -> None:
        """A remote trial folder gets a copy of the spool: this node may not come back."""
        if self._storage.local is None:
            for path in self._spool.folder.iterdir():
                self._storage.write(f"{SPOOL_FOLDER}/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Closes the files, whatever has been shipped."""
        self._progress_file.close()
        self._spool.close()


Journal: TypeAlias = TrialJournal | SilentJournal


def open_journal(spec: RunSpec, storage: Files, show: Callable[[Progress], None]) -> TrialJournal:
    """Rank 0's journal of an attempt, with the records of its start in the spool."""
    spool, destination = open_spool(spec, storage)
    loop, tracking = spec.run.loop, spec.tracking
    spool.append(*_starting_records(spec, storage))
    return TrialJournal(
        spool,
        start_shipper(tracking, spool, destination, storage, print_warning),
        storage,
        spec.attempt,
        loop.steps,
        loop.global_batch,
        tracking.step_metrics_every if isinstance(tracking, MLflowTracking) else _WINDOW_STEPS,
        show,
    )


def _starting_records(spec: RunSpec, storage: Files) -> list[TrackingRecord]:
    """How an attempt begins. Writes its configuration to the trial's artifacts, too."""
    config = spec.run.model_dump(mode="json")
    tags = {
        TRIAL_TAG: spec.trial,
        "maskray.study": spec.study,
        "maskray.seed": str(spec.run.seed),
        "maskray.attempt": str(spec.attempt),
        "maskray.ranks": str(spec.ranks),
        **{f"maskray.arm.{factor}": level for factor, level in spec.arm.items()},
        **spec.tags,
    }
    texts = {"config.yaml": yaml.safe_dump(config, sort_keys=False)}
    if spec.study_yaml:
        texts["study.yaml"] = spec.study_yaml
    records: list[TrackingRecord] = [
        Status(at=_now_ms(), status="RUNNING"),
        Tags(values=tags),
        Params(values=flattened(config)),
    ]
    for name, text in texts.items():
        path = f"{ARTIFACT_FOLDER}/{name}"
        storage.write(path, text.encode())
        records.append(Artifact(path=path, folder=""))
    return records


def _ending_records(outcome: Outcome) -> list[TrackingRecord]:
    tags: dict[str, str] = {"maskray.state": outcome.state}
    if outcome.error:
        tags |= {"maskray.error": outcome.error, "maskray.error_class": outcome.error_class}
    return [Tags(values=tags), Status(at=_now_ms(), status=_tracker_status(outcome))]


def _tracker_status(outcome: Outcome) -> Literal["FINISHED", "FAILED", "KILLED"]:
    match outcome.state:
        case "done":
            return "FINISHED"
        case "failed":
            return "FAILED"
        case "stopped" | "preempted":
            return "KILLED"


def _patience_s(outcome: Outcome) -> float:
    ended = outcome.state in ("done", "failed")
    return _LAST_SHIPMENT_S if ended else _HURRIED_SHIPMENT_S


def track_failure(spec: RunSpec, storage: Files, outcome: Outcome) -> None:
    """Lets the tracker know why an attempt failed. Its driver calls this: rank 0 may be dead.

    If a newer attempt has taken over, the tracker learns nothing of this one.
    """
    try:
        check_claim(storage, spec.attempt)
    except FencedError as error:
        print_warning(str(error))
        return
    spool, destination = open_spool(spec, storage)
    spool.append(*_ending_records(outcome))
    shipper = start_shipper(spec.tracking, spool, destination, storage, print_warning)
    if not shipper.close(_patience_s(outcome)):
        lacks = shipper.lacks()
        print_warning(f'send the rest later with "maskray sync {spool.folder}": {lacks}')
    spool.close()


def _window_means(rows: Sequence[Row], global_batch: int) -> dict[str, float]:
    """Means over a window of steps, the rate of images, and the share of time spent on waiting."""
    means = {name: sum(row.values[name] for row in rows) / len(rows) for name in rows[0].values}
    step_s, wait_s = means["step_s"], means.pop("wait_s")
    return {**means, "images_per_s": global_batch / step_s, "data_wait_fraction": wait_s / step_s}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
