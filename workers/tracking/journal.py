"""What a run tells as it goes: rank 0's spool, series, progress file and printed lines; other ranks' silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from contract.attempt import PROGRESS_FILE, Event, Progress
from contract.files import Files
from workers.tracking.series import Row, SeriesParts
from workers.tracking.spool import Record, Spool, metric_points
from workers.trial.checkpoints import check_claim

Phase = Literal["starting", "training", "evaluating", "finishing"]
NOTHING: Mapping[str, Any] = {"window": (), "tail": (), "events": ()}


class Journal(Protocol):
    """What the loop tells. Nothing here may take long or fail."""

    def rows(self, rows: Sequence[Row]) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def event(self, kind: str, step: int, text: str) -> None: ...
    def rewind(self, step: int) -> None: ...
    def artifact(self, path: str, folder: str) -> None: ...
    def progress(self, phase: Phase, step: int, row: Row | None) -> None: ...
    def state(self) -> Callable[[], dict[str, Any]]: ...
    def warn(self, text: str) -> None: ...


class SilentJournal:
    """Of every rank but the first."""

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

    def state(self) -> Callable[[], dict[str, Any]]:
        return dict

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


class TrialJournal:
    """Rank 0's. Step metrics are spooled as means over windows of `window_steps`; the series keeps every step."""

    def __init__(
        self,
        spool: Spool,
        storage: Files,
        attempt: int,
        steps: int,
        global_batch: int,
        window_steps: int,
        show: Callable[[Progress], None],
        shipped: bool = True,
    ) -> None:
        """shipped: the spool empties as the run goes on, so that a checkpoint can carry what is left of it."""
        self._spool, self._attempt, self._steps, self._shipped = spool, attempt, steps, shipped
        self._global_batch, self._window_steps = global_batch, window_steps
        self._series = SeriesParts(storage)
        self._window: list[Row] = []
        self._told: set[tuple[str, int]] = set()  # points that an earlier attempt spooled
        self._show = show
        self._progress_file = LatestFile(
            storage, PROGRESS_FILE, lambda: check_claim(storage, attempt), self.warn
        )
        self._rates: list[float] = []
        self.events: list[Event] = []

    # --- what the loop tells ---

    def rows(self, rows: Sequence[Row]) -> None:
        self._series.add(rows)
        for row in rows:
            self._window.append(row)
            if row.step % self._window_steps == 0 or row.step == self._steps:
                self.metrics(row.step, _window_means(self._window, self._global_batch))
                self._window = []
        if rows:
            self._rates = [row.values["step_s"] for row in rows]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        fresh = {name: value for name, value in values.items() if (name, step) not in self._told}
        if fresh:
            self._spool.append({"kind": "metrics", "at": _now_ms(), "step": step, "values": fresh})

    def event(self, kind: str, step: int, text: str) -> None:
        event = Event(at=time.time(), kind=kind, step=step, text=text)
        self.events.append(event)
        count = sum(e.kind == kind for e in self.events)
        self._spool.append(
            {"kind": "tags", "values": {f"maskray.event.{kind}.{count}": f"step {step}: {text}"}}
        )
        print(f"{kind} at step {step}: {text}", flush=True)

    def rewind(self, step: int) -> None:
        """Training goes back to `step`: later points will be told again, with other values."""
        self._spool.append({"kind": "rewind", "step": step})
        self._told = {point for point in self._told if point[1] <= step}
        self._window = [row for row in self._window if row.step <= step]
        self._series.rewind(step)

    def artifact(self, path: str, folder: str) -> None:
        """`path`: of a file in the trial's folder. `folder`: where the tracker shows it."""
        self._spool.append({"kind": "artifact", "path": path, "folder": folder})

    def progress(self, phase: Phase, step: int, row: Row | None) -> None:
        mean_s = sum(self._rates) / len(self._rates) if self._rates else None
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

    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)

    # --- across restarts ---

    def state(self) -> Callable[[], dict[str, Any]]:
        """What a checkpoint of this step carries, so that neither a kill nor a lost disk leaves a gap or a double.

        The loop's thread only notes what there is; what is returned reads and writes the files, on any thread.
        """
        rows = self._series.take()
        window = [[row.step, row.values] for row in self._window]
        events = [event.model_dump() for event in self.events]

        def read() -> dict[str, Any]:
            self._series.write_part(rows)
            tail = [record for _, record in self._spool.unsent(100_000)] if self._shipped else []
            return {"window": window, "tail": tail, "events": events}

        return read

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Takes up at `step`. Points that the spool or the tracker already holds will not be told twice.

        state: of a checkpoint; NOTHING if there is none, and earlier attempts may have told all the same.
        """
        known = self._spool.records()
        points = metric_points(known)
        written = {_identity(record) for record in known if record["kind"] != "metrics"}
        for record in state["tail"]:
            if record["kind"] == "metrics":
                missing = {
                    n: v for n, v in record["values"].items() if (n, record["step"]) not in points
                }
                if missing:
                    self._spool.append({**record, "values": missing})
            elif _identity(record) not in written:
                self._spool.append(record)
        # also of `step` itself, whose evaluation may have been told and is done again
        self._told = metric_points(self._spool.records())
        self._window = [Row(*pair) for pair in state["window"]]
        self.events = [Event.model_validate(event) for event in state["events"]]
        self._series.rewind(step)

    def finish_series(self, path: str) -> None:
        self._series.write_part(self._series.take())
        self._series.join(path)

    def close(self) -> None:
        self._progress_file.close()


class LatestFile:
    """Writes the latest value put into it on a thread, so that a slow disk holds up nobody. check: raises if fenced."""

    def __init__(
        self, storage: Files, path: str, check: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._storage, self._path, self._check, self._warn = storage, path, check, warn
        self._value: bytes | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def put(self, value: bytes) -> None:
        with self._changed:
            self._value = value
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._value is not None or self._closed)
                value, self._value = self._value, None
            if value is None:
                return
            try:
                self._check()
                self._storage.write(self._path, value)
            except (OSError, RuntimeError) as error:
                self._warn(f"{self._path} could not be written: {error}")


def _window_means(rows: Sequence[Row], global_batch: int) -> dict[str, float]:
    """Means of a window of steps, with the rate of images and the share of time spent waiting for data."""
    means = {name: sum(row.values[name] for row in rows) / len(rows) for name in rows[0].values}
    step_s, wait_s = means["step_s"], means.pop("wait_s")
    return {**means, "images_per_s": global_batch / step_s, "data_wait_fraction": wait_s / step_s}


def _identity(record: Record) -> str:
    return str(sorted((key, str(value)) for key, value in record.items()))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
