"""Checkpoints are whole or ignored, newest first, fenced by attempt, on a disk or behind a URI."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.files import Files
from contract.recipe import RunConfig
from tests.workers.fakes import fake_trial, small_run
from workers.training.state import check_same_run
from workers.trial.checkpoints import (
    WHEN_FULL,
    BackgroundWriter,
    CheckpointStore,
    FencedError,
    Snapshot,
)
from workers.trial.errors import classify
from workers.trial.stop import StopRequest


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step,
        {"w": torch.full((3,), float(step)), "nested": {"n": [1, torch.ones(2)]}},
        {"guard": step},
    )


def store_in(
    folder: Path | str, attempt: int = 1, keep: int = 2
) -> tuple[CheckpointStore, list[str]]:
    warnings: list[str] = []
    store = CheckpointStore(Files(str(folder)), attempt, keep, warnings.append)
    store.claim()
    return store, warnings


def test_what_was_published_is_loaded_and_old_ones_are_deleted(tmp_path):
    store, warnings = store_in(tmp_path)
    for step in (10, 20, 30):
        store.publish(snapshot(step))
    loaded = store.load(store.newest())
    assert loaded.step == 30
    assert loaded.tensors["w"].tolist() == [30.0] * 3
    assert loaded.plain == {"guard": 30}
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("0*")) == [
        "0001-00000020",
        "0001-00000030",
    ]
    assert not warnings


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no marker", "bad marker"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    store, warnings = store_in(tmp_path)
    for step in (10, 20):
        store.publish(snapshot(step))
    folder = tmp_path / "checkpoints" / "0001-00000020"
    data = bytearray((folder / "state.pt").read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            (folder / "state.pt").write_bytes(data)
        case "truncate":
            (folder / "state.pt").write_bytes(data[:-9])
        case "remove":
            (folder / "plain.json").unlink()
        case "no marker":
            (folder / "complete.json").unlink()
        case "bad marker":
            (folder / "complete.json").write_text("{}")
    assert store.newest() == "0001-00000010"
    [warning] = warnings
    assert "checkpoint 0001-00000020 is damaged" in warning


def test_an_older_attempt_can_publish_nothing_once_a_newer_one_has_claimed(tmp_path):
    old, _ = store_in(tmp_path, attempt=1)
    old.publish(snapshot(10))
    new, _ = store_in(tmp_path, attempt=2)
    with pytest.raises(FencedError, match="attempt 2 has taken over"):
        old.publish(snapshot(20))
    with pytest.raises(FencedError):
        store_in(tmp_path, attempt=1)
    new.publish(snapshot(12))
    assert new.newest() == "0002-00000012"


def test_of_two_starts_with_one_attempt_number_the_later_claim_holds(tmp_path):
    first, _ = store_in(tmp_path)
    first.publish(snapshot(10))
    second, _ = store_in(tmp_path)
    with pytest.raises(
        FencedError, match="attempt 1 was started twice; the other start has taken over"
    ):
        first.publish(snapshot(20))
    second.publish(snapshot(12))
    assert second.newest() == "0001-00000012"


def test_the_newest_is_of_the_latest_attempt_even_at_a_lower_step(tmp_path):
    old, _ = store_in(tmp_path, attempt=1)
    old.publish(snapshot(50))
    new, _ = store_in(tmp_path, attempt=2)
    new.publish(snapshot(40))
    assert new.newest() == "0002-00000040"


def test_checkpoints_hold_no_pickled_code(tmp_path):
    store, _ = store_in(tmp_path)
    store.publish(snapshot(1))
    path = tmp_path / "checkpoints" / store.newest() / "state.pt"
    assert torch.load(path, weights_only=True)["nested"]["n"][0] == 1


class FullStorage(Files):
    """A disk that is full before the checkpoint of step 8."""

    @contextmanager
    def replacing(self, path: str) -> Iterator[Any]:
        with super().replacing(path) as sink:
            if path.endswith("08/state.pt"):
                sink.write(b"half a")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield sink


def test_a_full_disk_ends_the_run_with_the_remedy_and_leaves_the_checkpoint_before(tmp_path):
    run = small_run(steps=8)
    with pytest.raises(
        RuntimeError, match=r"no space left on .* lower loop\.keep_checkpoints"
    ) as full:
        fake_trial(
            tmp_path / "full", run, storage=FullStorage(str(tmp_path / "full"), when_full=WHEN_FULL)
        )
    assert classify(full.value) == "node"
    assert not list((tmp_path / "full/checkpoints").rglob("*.part"))
    assert store_in(tmp_path / "full", attempt=2)[0].newest() == "0001-00000004"
    assert (
        fake_trial(tmp_path / "full", run, attempt=3).digest
        == fake_trial(tmp_path / "whole", run).digest
    )


class FillingSink:
    """Of a disk with room for `room` more bytes."""

    def __init__(self, sink: Any, room: int) -> None:
        self._sink, self._room = sink, room

    def write(self, data: Any) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._sink.write(data)


class FillingStorage(Files):
    """A disk that is full in the middle of the tensors of a checkpoint."""

    room = 0

    @contextmanager
    def replacing(self, path: str) -> Iterator[Any]:
        with super().replacing(path) as sink:
            yield FillingSink(sink, self.room) if path.endswith("state.pt") else sink


@pytest.mark.parametrize("room", [0, 100, 50_000, 400_500])
def test_a_disk_that_fills_up_inside_torchs_writer_is_told_as_full(tmp_path, room):
    storage = FillingStorage(str(tmp_path))
    storage.room = room
    store = CheckpointStore(storage, 1, 2, print)
    with pytest.raises(
        RuntimeError, match=r"no space left on .* while writing .*state\.pt; free some"
    ) as full:
        store.publish(Snapshot(1, {"w": torch.zeros(100_000)}, {}))
    assert classify(full.value) == "node"
    assert not list((tmp_path / "checkpoints").rglob("*.p*t*"))


def test_a_slow_write_does_not_hold_up_the_submitter_and_its_error_comes_later(tmp_path):
    allowed = threading.Event()

    def publish() -> None:
        allowed.wait(30)
        raise RuntimeError("the disk broke")

    writer = BackgroundWriter()
    writer.submit(publish)
    assert writer.busy
    allowed.set()
    with pytest.raises(RuntimeError, match="the disk broke"):
        writer.drain()
    writer.drain()


def test_while_a_checkpoint_is_written_the_next_is_passed_over_but_never_the_last(tmp_path, capsys):
    allowed = threading.Event()

    class HeldWriter(BackgroundWriter):
        def submit(self, work):  # type: ignore[no-untyped-def]
            super().submit(lambda: (allowed.wait(30), work()))

    def visit(now: int) -> None:
        if now == 10:
            allowed.set()

    fake_trial(tmp_path, small_run(keep_checkpoints=9), writer=HeldWriter, visit=visit)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/0*")) == [
        "0001-00000004",
        "0001-00000012",
    ]
    assert (
        "step 8: the checkpoint before is still being written, this one is passed over"
        in capsys.readouterr().out
    )


def test_a_checkpoint_of_another_configuration_is_refused_by_field(tmp_path):
    fake_trial(tmp_path, small_run(steps=4))
    with pytest.raises(
        ValueError, match=r"written with loop\.clip_grad_norm = 10\.0, this run has 1\.0"
    ):
        fake_trial(tmp_path, small_run(steps=4, clip_grad_norm=1.0), attempt=2)
    fake_trial(tmp_path, small_run(steps=4, keep_checkpoints=5), attempt=2)


def without(data: dict[str, Any], path: str) -> dict[str, Any]:
    """A copy without the field at a dotted path."""
    head, _, rest = path.partition(".")
    return {
        key: without(value, rest) if key == head else value
        for key, value in data.items()
        if rest or key != head
    }


def complete(run: RunConfig) -> dict[str, Any]:
    """As versions up to 89a7758 wrote it: with the fields at their default."""
    return run.model_dump(mode="json")


@pytest.mark.parametrize(
    "saved",
    [complete, RunConfig.sparse, lambda run: without(complete(run), "loop.guard.rate_factor")],
    ids=["complete", "sparse", "of before a field"],
)
def test_a_field_that_a_checkpoint_does_not_have_counts_as_its_default(tmp_path, saved):
    """The last kind refused every older checkpoint as soon as RunConfig got a field."""
    run = small_run(steps=8)
    stop = StopRequest()
    first = fake_trial(
        tmp_path, run, stop=stop, visit=lambda now: stop.ask("stopped") if now == 5 else None
    )
    assert first.state.step == 6
    store, _ = store_in(tmp_path, attempt=2)
    before = store.load(store.newest())
    store.publish(replace(before, plain={**before.plain, "run": saved(run)}))
    resumed = fake_trial(tmp_path, run, attempt=3)
    assert resumed.digest == fake_trial(tmp_path / "whole", run).digest
    with pytest.raises(ValueError, match=r"written with loop\.guard\.rate_factor = 0\.5, this run"):
        check_same_run(saved(run), small_run(steps=8, guard={"rate_factor": 0.25}))


def test_a_field_that_this_version_does_not_know_is_refused_by_name():
    saved = complete(small_run())
    saved["loop"]["frobnicate"] = 3
    with pytest.raises(
        ValueError, match=r"\Athe checkpoint's run: loop\.frobnicate: no such field; .*[^\n]*\Z"
    ) as refused:
        check_same_run(saved, small_run())
    assert "resume with that one, or start in a new folder" in str(refused.value)


def test_a_checkpoint_holds_the_run_without_the_fields_at_their_default(tmp_path):
    fake_trial(tmp_path, small_run(steps=4))
    [path] = tmp_path.glob("checkpoints/*/plain.json")
    saved = json.loads(path.read_text())["run"]
    assert saved == json.loads(json.dumps(small_run(steps=4).sparse()))
    assert "ema_decay" not in saved["loop"]


def test_storage_replaces_files_whole_or_not_at_all(tmp_path):
    storage = Files(str(tmp_path))
    storage.write("a/b.json", b"old")

    def write_half() -> None:
        with storage.replacing("a/b.json") as sink:
            sink.write(b"ne")
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        write_half()
    assert storage.read("a/b.json") == b"old"
    assert storage.names("a") == ["b.json"]


def test_a_uri_that_pyarrow_cannot_open_is_named():
    with pytest.raises(ValueError, match="gopher://x: not a URI"):
        Files("gopher://x").exists()


def test_checkpoints_behind_a_uri_are_published_found_and_pruned(s3_uri):
    store, _ = store_in(s3_uri)
    for step in (10, 20, 30):
        store.publish(snapshot(step))
    again, _ = store_in(s3_uri, attempt=2)
    assert again.load(again.newest()).tensors["w"].tolist() == [30.0] * 3
    names = Files(s3_uri).names("checkpoints")
    assert [name for name in names if name.startswith("0")] == ["0001-00000020", "0001-00000030"]
    assert json.loads(Files(s3_uri).read("checkpoints/claim.json"))["attempt"] == 2
