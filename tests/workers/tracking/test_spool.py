"""Each record arrives once and in order, whatever the tracker does; the loop never waits for it."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contract.attempt import Progress
from contract.files import Files
from tests.workers.fakes import fake_trial, small_run, trial_journal
from tests.workers.ranks import run_ranks
from tests.workers.training.test_resume import kill_in_step
from workers.tracking.journal import JournalState, TrialJournal
from workers.tracking.records import (
    Held,
    Metrics,
    Params,
    RejectedError,
    Rewind,
    Status,
    Tags,
    TrackingRecord,
)
from workers.tracking.series import Row
from workers.tracking.shipper import Shipper, ship_once
from workers.tracking.spool import Spool

EIGHT = small_run(steps=8, global_batch=8)


class FakeTracker:
    """Keeps records as MLflow does: the same record twice is one."""

    run_id = "run-1"

    def __init__(self) -> None:
        self.points: set[tuple[str, int, int, float]] = set()
        self.calls = 0
        self.failing = False
        self.refused = ""

    def send(self, records: Sequence[TrackingRecord]) -> None:
        self.calls += 1
        if self.failing:
            raise ConnectionError("no route to the tracker")
        for record in records:
            if record.kind == self.refused:
                raise RejectedError(f"no {record.kind} here")
            if isinstance(record, Metrics):
                for name, value in record.values.items():
                    self.points.add((name, record.at, record.step, value))


def metrics(step: int) -> Metrics:
    return Metrics(at=1000 + step, step=step, values={"loss": 1 / step})


def metric_steps(records: Iterable[TrackingRecord]) -> list[int]:
    """The steps of the records that hold a loss."""
    return [r.step for r in records if isinstance(r, Metrics) and "loss" in r.values]


def steps_of(tracker: FakeTracker) -> list[int]:
    return sorted(step for name, _, step, _ in tracker.points if name == "loss")


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "spool")
    yield opened
    opened.close()


def test_a_tracker_that_is_down_at_first_gets_all_of_it_later(spool):
    tracker, warnings = FakeTracker(), list[str]()
    tracker.failing = True
    for step in range(1, 4):
        spool.append(metrics(step))
    shipper = Shipper(spool, tracker, warnings.append, idle_s=0.01)
    assert not shipper.close(30)
    assert len(warnings) == 1
    tracker.failing = False
    assert Shipper(spool, tracker, warnings.append).close(30)
    assert steps_of(tracker) == [1, 2, 3]


def test_flushing_waits_for_a_tracker_that_takes_records_and_not_for_one_that_fails(spool):
    tracker = FakeTracker()
    shipper = Shipper(spool, tracker, print, idle_s=1000)
    for step in range(1, 4):
        spool.append(metrics(step))
        shipper.flush(60)
        assert steps_of(tracker) == list(range(1, step + 1))
    tracker.failing = True
    spool.append(metrics(4))
    shipper.flush(1000)
    assert steps_of(tracker) == [1, 2, 3]
    tracker.failing = False
    assert shipper.close(60)
    assert steps_of(tracker) == [1, 2, 3, 4]


def test_a_shipment_repeated_after_a_kill_adds_nothing(spool):
    tracker = FakeTracker()
    for step in range(1, 6):
        spool.append(metrics(step))
    ship_once(spool, tracker, print)
    spool.advance(0)  # killed between sending and remembering it
    ship_once(spool, tracker, print)
    assert steps_of(tracker) == [1, 2, 3, 4, 5]
    assert (tracker.calls, len(tracker.points)) == (2, 5)


def test_a_line_torn_by_a_crash_is_dropped_and_the_next_is_whole(tmp_path):
    first = Spool(tmp_path)
    first.append(metrics(1))
    first.close()
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')
    again = Spool(tmp_path)
    again.append(metrics(2))
    again.close()
    assert metric_steps(again.records()) == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"\0" * 64, b"\xff\xfe{", b"17", b'{"kind'], ids=["zeros", "bytes", "number", "torn"]
)
@pytest.mark.parametrize("shipped", [0, 1, 2])
def test_a_damaged_line_is_set_aside_with_one_warning(tmp_path, damage, shipped):
    tracker, warnings = FakeTracker(), list[str]()
    first = Spool(tmp_path)
    ends = [0]
    for step in (1, 2):
        first.append(metrics(step))
        ends.append((tmp_path / "records.jsonl").stat().st_size)
    first.advance(ends[shipped])
    first.close()
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines()
    (tmp_path / "records.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[1], damage, b""]))
    beside = Spool(tmp_path, take=False, warn=warnings.append)
    assert set(metric_steps(record for _, record in beside.unsent())) <= {1, 2}
    beside.close()
    (tmp_path / "rejected.jsonl").unlink()
    again = Spool(tmp_path, warn=warnings.append)
    again.append(metrics(3))
    assert metric_steps(again.records()) == [1, 2, 3]
    assert Shipper(again, tracker, warnings.append).close(30)
    again.close()
    assert steps_of(tracker) == [1, 2, 3]
    assert len(warnings) == 2  # of each opening
    assert "2 damaged line(s)" in warnings[0]
    aside = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert aside == [{"reason": "damaged", "record": repr(damage + b"\n")}] * 2
    Spool(tmp_path, warn=warnings.append).close()
    assert len(warnings) == 2


def test_a_process_whose_spool_was_taken_over_adds_and_ships_nothing(tmp_path):
    tracker, warnings = FakeTracker(), list[str]()
    old = Spool(tmp_path)
    old.append(metrics(1))
    new = Spool(tmp_path)
    old.append(metrics(2))
    assert metric_steps(new.records()) == [1]
    assert Shipper(old, tracker, warnings.append).close(30)
    assert not tracker.calls
    assert "a newer attempt has taken" in warnings[0]
    new.append(metrics(3))
    assert Shipper(new, tracker, warnings.append).close(30)
    assert steps_of(tracker) == [1, 3]
    old.close()
    new.close()


def test_a_record_of_a_newer_version_is_kept_and_told_to_nobody(tmp_path):
    line = b'{"kind": "future", "answer": 42}\n'
    (tmp_path / "records.jsonl").write_bytes(line)
    warnings = list[str]()
    spool = Spool(tmp_path, warn=warnings.append)
    spool.append(metrics(1))
    tracker = FakeTracker()
    assert Shipper(spool, tracker, warnings.append).close(30)
    spool.close()
    assert steps_of(tracker) == [1]
    assert (tmp_path / "records.jsonl").read_bytes().startswith(line)
    assert not warnings
    assert not (tmp_path / "rejected.jsonl").exists()


@pytest.mark.parametrize("cursor", ["", "{}", "[]", '{"bytes": 1000000}'])
def test_a_damaged_cursor_ships_everything_again_which_adds_nothing(tmp_path, cursor):
    tracker = FakeTracker()
    for _ in range(2):
        spool = Spool(tmp_path)
        spool.append(metrics(1))
        assert Shipper(spool, tracker, print).close(30)
        spool.close()
        (tmp_path / "cursor.json").write_text(cursor)
    assert steps_of(tracker) == [1]


def test_a_full_disk_under_the_spool_is_one_clear_error(spool):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    spool.close()
    spool._file = Full()
    with pytest.raises(
        RuntimeError, match=r"no space left on .*spool while writing records\.jsonl; free some"
    ):
        spool.append(metrics(1))


def test_a_record_that_is_refused_for_good_is_set_aside_and_holds_up_no_other(spool):
    tracker, warnings = FakeTracker(), list[str]()
    tracker.refused = "params"
    for record in (metrics(1), Params(values={"a": "b"}), metrics(2)):
        spool.append(record)
    ship_once(spool, tracker, warnings.append)
    assert steps_of(tracker) == [1, 2]
    assert "no params here" in warnings[0]
    assert json.loads((spool.folder / "rejected.jsonl").read_text())["record"]["kind"] == "params"


def test_appending_never_waits_for_a_tracker_that_hangs(spool):
    release, entered = threading.Event(), threading.Event()

    class Hanging:
        run_id = ""

        def send(self, records: Sequence[TrackingRecord]) -> None:
            entered.set()
            release.wait(60)

    spool.append(metrics(1))
    shipper = Shipper(spool, Hanging(), print)
    assert entered.wait(60)
    for step in range(2, 500):
        spool.append(metrics(step))  # returns though nothing is being sent
    assert len(spool.records()) == 499
    release.set()
    assert shipper.close(60)


def test_points_after_a_rewind_are_new_again():
    held = Held([metrics(1), metrics(2), metrics(3), Rewind(step=1), metrics(2)])
    assert [held.new_part(metrics(step)) for step in (1, 2, 3)] == [None, None, metrics(3)]


def test_of_a_record_that_is_held_in_part_the_rest_is_new():
    held = Held([metrics(1), Tags(values={"a": "b"})])
    both = Metrics(at=7, step=1, values={"loss": 2.0, "lr": 0.1})
    assert held.new_part(both) == Metrics(at=7, step=1, values={"lr": 0.1})
    assert held.new_part(Tags(values={"a": "b"})) is None
    assert held.new_part(Tags(values={"a": "c"})) == Tags(values={"a": "c"})


def test_a_spool_is_written_and_read_as_earlier_versions_did(tmp_path):
    """Lines that the version of 89a7758 wrote; a metric that is not finite is one of them."""
    lines = (
        '{"kind": "status", "at": 5, "status": "RUNNING"}\n'
        '{"kind": "tags", "values": {"maskray.trial": "t-1"}}\n'
        '{"kind": "params", "values": {"seed": "0"}}\n'
        '{"kind": "artifact", "path": "artifacts/config.yaml", "folder": ""}\n'
        '{"kind": "metrics", "at": 6, "step": 2, "values": {"loss": NaN, "lr": 0.02}}\n'
        '{"kind": "rewind", "step": 1}\n'
    )
    (tmp_path / "records.jsonl").write_text(lines)
    spool = Spool(tmp_path)
    records = spool.records()
    assert records[0] == Status(at=5, status="RUNNING")
    spool.append(*records)
    spool.close()
    assert (tmp_path / "records.jsonl").read_text() == lines * 2


# --- the journal across restarts ---


def window_points(folder: Path) -> list[int]:
    spool = Spool(folder / "spool")
    spool.close()
    return metric_steps(spool.records())


def test_a_killed_and_resumed_run_spools_every_window_once(tmp_path):
    run = small_run()
    run_ranks(kill_in_step, 1, tmp_path, run, 7, 0)
    assert window_points(tmp_path) == [2, 4, 6]  # step 6 lies beyond the checkpoint of step 4
    fake_trial(tmp_path, run, attempt=2)
    assert window_points(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_a_run_killed_before_its_first_checkpoint_spools_every_window_once(tmp_path):
    run = small_run()
    run_ranks(kill_in_step, 1, tmp_path, run, 3, 0)
    assert window_points(tmp_path) == [2]
    trial = fake_trial(tmp_path, run, attempt=2)
    assert window_points(tmp_path) == [2, 4, 6, 8, 10, 12]
    trial.journal.finish_series("series.parquet")
    assert pq.read_table(tmp_path / "series.parquet")["step"].to_pylist() == list(range(1, 13))


def test_an_evaluation_that_was_told_before_a_kill_and_is_done_again_is_told_once(tmp_path):
    for attempt in (1, 2):
        spool = Spool(tmp_path / "spool")
        journal = trial_journal(spool, Files(str(tmp_path)), attempt, EIGHT, 50)
        journal.restore(JournalState(), 4)
        journal.metrics(4, {"bbox/AP": 0.5})
        journal.close()
    [record] = spool.records()
    assert isinstance(record, Metrics)
    assert record.values == {"bbox/AP": 0.5}


def test_what_was_told_while_a_checkpoint_was_written_is_told_once_after_the_spool_is_lost(
    tmp_path,
):
    def journal_in(name: str) -> tuple[Spool, TrialJournal]:
        spool = Spool(tmp_path / name)
        return spool, trial_journal(spool, Files(str(tmp_path)), 1, EIGHT)

    def row(step: int) -> Row:
        return Row(step, {"loss": 1.0, "step_s": 0.5, "wait_s": 0.0})

    spool, journal = journal_in("lost")
    journal.rows([row(1), row(2)])
    state = journal.state()
    journal.rows([row(3), row(4)])  # the loop goes on
    # as a checkpoint keeps it
    checkpoint = JournalState.model_validate(json.loads(json.dumps(state().model_dump())))
    journal.close()
    spool, journal = journal_in("new")
    journal.restore(checkpoint, 2)
    journal.rows([row(3), row(4), row(5), row(6)])
    journal.close()
    assert metric_steps(spool.records()) == [2, 4, 6]


def test_progress_of_an_attempt_that_was_taken_over_is_not_written(tmp_path, capsys):
    storage = Files(str(tmp_path))
    spool = Spool(tmp_path / "spool")
    journal = trial_journal(spool, storage, 1, EIGHT)
    storage.write_json("checkpoints/claim.json", {"attempt": 2})
    journal.progress("training", 4, None)
    journal.close()
    assert not (tmp_path / "progress.json").exists()
    assert "attempt 2 has taken over" in capsys.readouterr().out


def test_a_run_resumed_on_another_node_fills_in_what_its_lost_spool_held(tmp_path):
    run = small_run()
    run_ranks(kill_in_step, 1, tmp_path, run, 7, 0)
    (tmp_path / "spool").rename(tmp_path / "lost")
    fake_trial(tmp_path, run, attempt=2)
    assert window_points(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_the_series_has_every_step_once_after_kill_and_resume(tmp_path):
    run = small_run()
    run_ranks(kill_in_step, 1, tmp_path / "killed", run, 7, 0)
    killed = fake_trial(tmp_path / "killed", run, attempt=2)
    whole = fake_trial(tmp_path / "whole", run)
    killed.journal.finish_series("series.parquet")
    whole.journal.finish_series("series.parquet")
    tables = [pq.read_table(tmp_path / name / "series.parquet") for name in ("killed", "whole")]
    assert tables[0]["step"].to_pylist() == list(range(1, 13))
    for name in ("loss", "loss/rare", "grad_norm", "lr"):
        assert tables[0][name].to_pylist() == tables[1][name].to_pylist()


def test_progress_is_a_whole_file_at_every_moment(tmp_path):
    spool = Spool(tmp_path / "spool")
    seen: list[Progress] = []
    run = small_run(steps=100, global_batch=8)
    journal = trial_journal(spool, Files(str(tmp_path)), 3, run, show=seen.append)
    row = Row(10, {"loss": float("nan"), "step_s": 0.5, "wait_s": 0.1})
    journal.rows([row])
    journal.progress("training", 10, row)
    journal.close()
    progress = Progress.model_validate_json((tmp_path / "progress.json").read_text())
    assert (progress.attempt, progress.step, progress.loss) == (3, 10, None)
    assert (seen[0].images_per_s, seen[0].seconds_left) == (16.0, 45.0)
