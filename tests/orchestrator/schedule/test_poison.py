"""Folders of trials that hold what no trial of ours writes: each fails alone, with the reason."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from orchestrator.ledger import commands, queries
from orchestrator.server import views
from tests.orchestrator.fake_cluster import House
from tests.orchestrator.submissions import identity, plan

Poison = Callable[[Path], object]
RESULT = {
    "metrics": {"segm/AP": 0.5},
    "step": 9,
    "attempt": 1,
    "world_size": 1,
    "weights_sha256": "0" * 64,
}
DEEP = "[" * 20_000 + "]" * 20_000


def text(words: str) -> Poison:
    return lambda path: path.write_text(words)


def result(**fields: object) -> Poison:
    return text(json.dumps({**RESULT, **fields}))


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1_500_000_000)


def folder_in_its_place(path: Path) -> None:
    path.mkdir()


def linked(path: Path) -> None:
    target = path.parent / "elsewhere.json"
    target.write_text(json.dumps(RESULT))
    path.symlink_to(target)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


ANY_FILE: Mapping[str, tuple[Poison, str]] = {
    "a pipe": (os.mkfifo, "a pipe"),
    "1.5 GB": (huge, "1500000000 bytes"),
    "nested lists": (text(DEEP), "nested deeper"),
    "nested objects": (text('{"a":' * 500 + "1" + "}" * 500), "nested deeper"),
    "a folder": (folder_in_its_place, "a folder"),
    "a link": (linked, "is a link"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is a link"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a link"),
    "a socket": (bound_socket, "socket"),
    "an integer that SQL cannot hold": (text('{"step": 1' + "0" * 20 + "}"), "out of range"),
}
OF_ANSWERS: Mapping[str, tuple[Poison, str]] = {
    "no UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "no UTF-8"),
    "no JSON": (text('{"state": '), "no JSON"),
    "an integer of 5,000 digits": (text('{"step": ' + "9" * 5000 + "}"), "no JSON"),
    "a list": (text("[1, 2]"), "valid dictionary"),
    "missing keys": (text("{}"), "Field required"),
}
OF_RESULT: Mapping[str, tuple[Poison, str]] = {
    "step 10^20": (result(step=10**20), "out of range"),
    "step 2^33": (result(step=2**33), "step: Input should be less than 2147483648"),
    "a negative step": (result(step=-1), "step: Input should be greater"),
    "a metric that is no number": (result(metrics={"a": float("nan")}), "metrics.a"),
    "an endless metric": (result(metrics={"a": float("inf")}), "metrics.a"),
    "a metric that is a list": (result(metrics={"a": [1]}), "metrics.a"),
    "6,000 metrics": (result(metrics={str(i): 0.0 for i in range(6000)}), "metrics"),
    "a long run id": (result(mlflow_run_id="x" * 100), "mlflow_run_id"),
    "an event at step 2^40": (
        result(events=[{"at": 0, "kind": "a", "step": 2**40, "text": ""}]),
        "events.0.step",
    ),
}
OF_PROGRESS: Mapping[str, tuple[Poison, str]] = {
    "step 2^33": (
        text('{"attempt": 1, "step": 8589934592, "steps": 9, "phase": "training"}'),
        "step: Input should be less than 2147483648",
    ),
}
OF_NODES: Mapping[str, tuple[Poison, str]] = {
    "blanks in a node's name": (text('["a b"]'), "match pattern"),
    "numbers for nodes": (text("[1]"), "valid string"),
}
OF_LOG: Mapping[str, tuple[Poison, str]] = {
    "a folder": (folder_in_its_place, "is a folder"),
}
PLACES = {
    "result.json": {**ANY_FILE, **OF_ANSWERS, **OF_RESULT},
    "attempts/1/outcome.json": {**ANY_FILE, **OF_ANSWERS},
    "progress.json": {**ANY_FILE, **OF_PROGRESS},
    "attempts/1/nodes.json": {**ANY_FILE, **OF_NODES},
    "attempts/1/driver.log": OF_LOG,
}
CASES = [
    (file, name, poison, words)
    for file, poisons in PLACES.items()
    for name, (poison, words) in poisons.items()
]


def test_each_poisoned_trial_fails_alone_with_the_reason(tmp_path):
    house = House(tmp_path)
    house.cluster.cpus = 1000
    study = house.submit(*(plan(f"p{i}", identity(f"p{i}")) for i in range(len(CASES))))
    good = f"{house.submit(plan('good', identity('good')))}-000"
    house.tick()
    for index, (file, _, poison, _) in enumerate(CASES):
        job = f"{study}-{index:03d}-1"
        house.cluster.end(job)
        path = Path(house.cluster.specs[job].storage, file)
        path.unlink(missing_ok=True)
        poison(path)
    house.cluster.end(f"{good}-1")
    house.tick()
    assert house.state(good) == "done"
    rows = [house.trial(f"{study}-{index:03d}") for index in range(len(CASES))]
    odd = {
        (file, name): (row.state, row.error)
        for (file, name, _, words), row in zip(CASES, rows, strict=True)
        if row.state != "failed" or words not in row.error or file.split("/")[-1] not in row.error
    }
    assert not odd
    assert {row.error_class for row in rows} == {"person"}
    assert max(len(row.error) for row in rows) < 600
    house.ledger.close()


@pytest.mark.parametrize("place", ["progress.json", "attempts/1/nodes.json"])
def test_while_it_runs_odd_progress_is_told_and_the_others_go_on(tmp_path, place):
    house = House(tmp_path)
    study = house.submit(plan("bad", identity("bad")), plan("good", identity("good")))
    bad, good = f"{study}-000", f"{study}-001"
    house.tick(2)
    house.cluster.spoke = lambda _: False  # it would read the pipe itself
    os.mkfifo(Path(house.trial(bad).folder, place))
    house.cluster.step(f"{good}-1", 4)
    house.tick()
    assert house.trial(good).progress.step == 4
    told = house.loop.troubles.words.get(bad, "")
    assert ("pipe" in told) == (place == "progress.json")
    with house.ledger.reading() as transaction:
        (view,) = views.study_views(transaction, {}, study)
    assert view.trials[0].state == "running"
    house.ledger.close()


@pytest.mark.parametrize("poison", [os.mkfifo, folder_in_its_place])
def test_a_cancelled_trial_whose_progress_is_odd_lends_nobody_its_result(tmp_path, poison):
    house = House(tmp_path)
    study = house.submit(plan("a"))
    trial = f"{study}-000"
    house.tick(2)
    house.act(commands.cancel_study, study)
    house.cluster.end(f"{trial}-1")
    progress = Path(house.trial(trial).folder, "progress.json")
    progress.unlink(missing_ok=True)
    poison(progress)
    house.tick()
    assert (house.state(trial), house.trial(trial).metrics) == ("cancelled", {})
    assert house.state(f"{house.submit(plan('a'))}-000") == "queued"
    house.ledger.close()


def test_a_retry_whose_folder_is_taken_by_a_file_ends_too(tmp_path):
    """The first attempt leaves a file where the spec of the second one goes."""
    house = House(tmp_path)
    trial = f"{house.submit(plan('a'))}-000"
    house.tick()
    Path(house.trial(trial).folder, "attempts/2").write_text("mine")
    house.cluster.end(f"{trial}-1", code=1, done=False)
    house.tick(3)
    row = house.trial(trial)
    assert (row.state, row.attempts) == ("failed", 2)
    assert "attempts/2/spec.json: lies below a file" in row.error
    house.ledger.close()


def test_what_a_link_leads_to_is_neither_read_nor_written(tmp_path):
    house = House(tmp_path)
    trial = f"{house.submit(plan('a'))}-000"
    house.tick()
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = Path(house.trial(trial).folder)
    folder.joinpath("attempts").rename(tmp_path / "attempts")
    folder.joinpath("attempts").symlink_to(outside)
    house.cluster.alive[f"{trial}-1"] = house.cluster.alive.pop(f"{trial}-1").__class__(
        f"{trial}-1", "FAILED", "", 1, "n", {}
    )
    house.tick()
    assert house.state(trial) == "failed"
    assert list(outside.iterdir()) == []
    house.ledger.close()


def test_the_words_of_an_error_are_shown_as_they_are(tmp_path):
    """PostgreSQL holds no NUL, and a terminal obeys escape sequences."""
    house = House(tmp_path)
    trial = f"{house.submit(plan('a'), max_attempts=1)}-000"
    house.tick()
    outcome = {"state": "failed", "error": "a\0b \x1b[31mred\ud800", "error_class": "unknown"}
    path = Path(house.trial(trial).folder, "attempts/1/outcome.json")
    path.write_text(json.dumps(outcome))
    house.cluster.end(f"{trial}-1", code=1, done=False)
    house.tick()
    assert house.trial(trial).error == r"a\x00b \x1b[31mred\ud800"
    house.ledger.close()


def test_an_error_that_nobody_foresaw_is_one_trials(tmp_path, monkeypatch, caplog):
    house = House(tmp_path)
    study = house.submit(plan("bad", identity("bad")), plan("good", identity("good")))
    bad, good = f"{study}-000", f"{study}-001"
    house.tick(2)
    for trial in (bad, good):
        house.cluster.end(f"{trial}-1")
    real = queries.trial_row

    def broken(transaction, trial):
        if trial == bad:
            raise KeyError("nobody foresaw this")
        return real(transaction, trial)

    monkeypatch.setattr(queries, "trial_row", broken)
    house.tick()
    assert "nobody foresaw this" in house.loop.troubles.words[bad]
    assert "nobody foresaw this" in caplog.text
    monkeypatch.undo()
    assert (house.state(bad), house.state(good)) == ("running", "done")
    house.tick()
    assert house.state(bad) == "done"
    house.ledger.close()
