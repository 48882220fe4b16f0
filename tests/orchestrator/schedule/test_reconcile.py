"""The loop against a cluster made of a dict.

Every end of an attempt, and a service that dies at any point.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from contract.attempt import LIVE_ATTEMPTS, Outcome, Result
from orchestrator.cluster.jobs import Job, JobRefusedError, UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import commands
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES
from orchestrator.schedule.reconcile import Reconciler
from tests.orchestrator.fake_cluster import DiedError, House
from tests.orchestrator.submissions import identity, plan


def test_a_trial_goes_from_the_queue_to_its_result(house):
    study = house.submit(plan("a"))
    trial = f"{study}-000"
    house.tick()
    assert house.state(trial) == "starting"
    house.tick()
    house.cluster.step(f"{trial}-1", 4)
    house.tick()
    assert (house.state(trial), house.trial(trial).progress.step) == ("running", 4)
    house.cluster.end(f"{trial}-1")
    house.tick()
    row = house.trial(trial)
    assert (row.state, row.metrics, row.error) == ("done", {"segm/AP": 0.5}, "")
    assert house.kinds(trial) == ["starting", "running", "done"]
    assert house.cluster.alive == {}, "Ray's own memory of the job is dropped"
    assert Path(row.folder, "attempts/1/driver.log").read_text() == f"log of {trial}-1"


def test_a_full_disk_under_one_trial_holds_up_no_other(house, monkeypatch):
    """The driver's log of the first trial cannot be kept, so the trial is looked at again."""
    house.cluster.cpus = 4
    study = house.submit(plan("a"), plan("b", identity("b")))
    first, second = f"{study}-000", f"{study}-001"
    house.tick(2)
    for trial in (first, second):
        house.cluster.end(f"{trial}-1")
    sync = os.fsync

    def full(handle: int) -> None:
        if first in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    house.tick()
    assert house.state(first) != "done"
    assert house.state(second) == "done"
    monkeypatch.undo()
    house.tick()
    assert house.state(first) == "done"


def test_an_attempt_whose_step_stands_still_is_started_again(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    house.cluster.step(f"{trial}-1", 4)
    house.tick()
    house.now += 99
    house.tick()
    assert house.state(trial) == "stopping", house.now
    house.tick()
    assert house.cluster.stops == [f"{trial}-1"]
    house.cluster.end(f"{trial}-1", 76, Outcome(state="stopped", step=4), done=False)
    house.tick()
    assert (house.state(trial), house.trial(trial).error_class) == ("starting", "collective")
    assert house.cluster.started == [f"{trial}-1", f"{trial}-2"]
    assert "stalled" in house.kinds(trial)


def test_after_a_hang_the_next_attempt_keeps_off_the_node_and_the_one_after_a_loss_does_not(house):
    both = [Node(name, {"CPU": 1.0}, {"CPU": 1.0}) for name in ("n0", "n1")]
    house.cluster.nodes = lambda: both  # type: ignore[method-assign]
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    folder = Path(house.trial(trial).folder)
    (folder / "attempts/1/nodes.json").write_text('["n0"]')
    broken = Outcome(
        state="failed", error_class="collective", error="rank 0: transaction closed by peer"
    )
    house.cluster.end(f"{trial}-1", 1, broken, done=False)
    house.tick(2)
    assert house.trial(trial).suspects == "n0"
    assert house.cluster.specs[f"{trial}-2"].avoid_nodes == ("n0",)
    assert house.cluster.specs[f"{trial}-1"].avoid_nodes == ()
    (folder / "attempts/2/nodes.json").write_text('["n1"]')
    house.cluster.end(f"{trial}-2", -9, done=False)
    house.tick(2)
    assert house.cluster.specs[f"{trial}-3"].avoid_nodes == ()


def test_a_head_that_forgot_everything_costs_no_failure(house):
    trial = f"{house.submit(plan('a'))}-000"
    for attempt in (1, 2, 3, 4):
        house.tick(2)
        house.cluster.step(f"{trial}-{attempt}", attempt)
        house.tick()
        house.cluster.alive.clear()
    house.tick(2)
    row = house.trial(trial)
    assert (row.attempts, row.failures, row.lost, row.best_step) == (5, 0, 1, 4)


def test_a_result_written_before_the_head_died_is_not_run_again(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    house.cluster.end(f"{trial}-1")
    house.cluster.alive.clear()
    house.tick(2)
    assert (house.state(trial), house.cluster.started) == ("done", [f"{trial}-1"])


def test_a_result_of_an_older_attempt_does_not_end_a_newer_one(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    house.cluster.alive.clear()  # lost, but its ranks still write
    house.tick(2)
    late = Result(
        metrics={"segm/AP": 0.9}, step=9, attempt=1, world_size=1, weights_sha256="0" * 64
    )
    Path(house.trial(trial).folder, "result.json").write_text(late.model_dump_json())
    house.cluster.end(f"{trial}-2", -9, done=False)
    house.tick()
    assert (house.state(trial), house.trial(trial).attempts) == ("starting", 3)


def test_nothing_changes_while_ray_does_not_answer(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    house.cluster.down = True
    with pytest.raises(UnreachableError):
        house.tick()
    assert house.state(trial) == "running"
    house.act(commands.cancel_trial, trial)
    house.cluster.down = False
    house.tick()
    assert house.cluster.stops == [f"{trial}-1"], "a cancel given meanwhile is honoured"


def test_a_cancel_that_comes_while_an_attempt_is_judged_is_kept(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    house.cluster.end(
        f"{trial}-1", 1, Outcome(state="failed", error_class="node", error="lost"), done=False
    )
    plain = house.cluster.log

    def cancelled_meanwhile(name: str) -> str:
        house.cluster.log = plain
        house.act(commands.cancel_trial, trial)
        return str(plain(name))

    house.cluster.log = cancelled_meanwhile
    house.tick(2)
    assert house.state(trial) == "cancelled"
    assert house.cluster.started == [f"{trial}-1"]


def test_a_pause_that_comes_while_trials_are_being_started_starts_no_more(house):
    study = house.submit(plan("a", identity("a")), plan("b", identity("b")))
    plain = house.cluster.submit

    def paused_meanwhile(*arguments: Any, **more: Any) -> None:
        house.cluster.submit = plain
        house.act(commands.pause_study, study)
        plain(*arguments, **more)

    house.cluster.submit = paused_meanwhile
    house.tick()
    assert [house.state(f"{study}-00{i}") for i in range(2)] == ["stopping", "queued"]


def test_what_runs_in_a_paused_study_is_stopped(house):
    study = house.submit(plan("a"))
    house.tick(2)
    with (
        house.ledger.writing() as transaction
    ):  # the pause of another database session that saw it queued
        transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(state="paused"))
    house.tick(2)
    assert (house.state(f"{study}-000"), house.cluster.stops) == ("stopping", [f"{study}-000-1"])


def test_jobs_that_the_ledger_holds_for_over_are_ended_and_those_of_others_left_alone(house):
    trial = f"{house.submit(plan('a'))}-000"
    house.tick(2)
    job = house.cluster.alive[f"{trial}-1"]
    house.cluster.alive["other"] = Job(
        "other", "RUNNING", "", None, "n", {"maskray": "of another ledger"}
    )
    # The first is one that Ray does not stop, the second says what no ledger can hold.
    for name, of in (("held", "x"), ("odd", "\0" * 500), ("stray", "gone-000")):
        metadata = {**job.metadata, "trial": of}
        house.cluster.alive[name] = Job(name, "RUNNING", "", None, "n", metadata)
    stop = house.cluster.stop

    def refusing(name: str) -> None:
        if name == "held":
            raise JobRefusedError("job held: no")
        stop(name)

    house.cluster.stop = refusing
    waiting = house.submit(plan("b", identity("b")))
    house.tick()
    assert house.cluster.stops == ["odd", "stray"]
    assert (house.kinds("gone-000"), house.kinds("")[-1]) == (["orphan"], "orphan")
    assert house.state(f"{waiting}-000") == "starting"


faults = st.lists(
    st.tuples(
        st.sampled_from(
            ["die", "lose", "crash", "fail", "cancel", "pause", "resume", "forget-jobs", "nothing"]
        ),
        st.integers(0, 11),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(faults=faults)
@example(faults=[("die", 8), ("lose", 0), ("die", 9), ("forget-jobs", 0)])
def test_every_trial_ends_exactly_once_whatever_dies(tmp_path_factory, faults):
    """A person's wishes and random deaths: of jobs, the head, the service at any call to Ray."""
    house = House(tmp_path_factory.mktemp("chaos"), limits={"lost_without_progress": 50})
    study = house.submit(*(plan(f"t{i}", identity(f"t{i}")) for i in range(3)), max_attempts=50)
    trials = [f"{study}-00{i}" for i in range(3)]
    forgotten: set[str] = set()

    def turn() -> None:
        try:
            house.tick()
        except DiedError:
            house.loop = Reconciler(
                house.ledger, house.settings
            )  # the next service knows the ledger alone
        live = [
            name.rpartition("-")[0]
            for name, job in house.cluster.alive.items()
            if job.state == "RUNNING"
        ]
        assert len(set(live)) == len(live), "two attempts of one trial at once"

    for fault, which in faults:
        running = [name for name, job in house.cluster.alive.items() if job.state == "RUNNING"]
        chosen = running[which % len(running)] if running else ""
        match fault:
            case "die":
                house.cluster.die_in, house.cluster.die_before = which // 2 + 1, which % 2 == 0
            case "lose" | "crash" | "fail" if chosen:
                outcome = (
                    Outcome(state="failed", error_class="collective", error="boom")
                    if fault == "fail"
                    else None
                )
                house.cluster.end(
                    chosen, {"lose": None, "crash": -9, "fail": 1}[fault], outcome, done=False
                )
            case "cancel":
                house.act(commands.cancel_trial, trials[which % 3])
            case "pause":
                house.act(commands.pause_study, study)
            case "resume":
                house.act(commands.resume_study, study)
            case "forget-jobs":
                forgotten |= house.cluster.alive.keys()
                house.cluster.alive.clear()
        turn()
    house.cluster.die_in = -1
    house.act(commands.resume_study, study)
    for _ in range(40):
        turn()
        for name, job in list(house.cluster.alive.items()):
            if job.state == "RUNNING":
                stopped = name in house.cluster.stops
                house.cluster.end(
                    name,
                    76 if stopped else 0,
                    Outcome(state="stopped") if stopped else None,
                    not stopped,
                )
    with house.ledger.reading() as transaction:
        ended = list(
            transaction.execute(
                select(EVENTS.c.trial).where(EVENTS.c.kind.in_(("done", "cancelled", "failed")))
            ).scalars()
        )
        assert sorted(ended) == trials, "each trial ends once"
        assert transaction.execute(select(STUDIES.c.state)).scalar() in ("done", "cancelled")
        states = transaction.execute(select(ATTEMPTS.c.state)).scalars().all()
        assert not set(states) & set(LIVE_ATTEMPTS)
    assert house.cluster.alive == {}, "nothing is left behind"
    twice = {name for name, starts in Counter(house.cluster.started).items() if starts > 1}
    # a head that forgets a job before the service has noted its start makes the service start it
    # again: a claim's token tells the two apart, should the first one live
    assert twice <= forgotten, "no attempt was started twice"
    house.ledger.close()
