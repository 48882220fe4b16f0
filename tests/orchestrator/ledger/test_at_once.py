"""Many people and the loop change a ledger at once, and many trials change together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sqlalchemy import update

from orchestrator.ledger import attempts, commands, queries, sweep
from orchestrator.ledger.changes import give_up, move_trial, take_finished
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.server import views
from tests.orchestrator.submissions import plan


def at_once(*actions):
    """What each action returned, all started together."""
    barrier = threading.Barrier(len(actions))

    def run(action):
        barrier.wait(30)
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(run, action) for action in actions]]


def contradictions(ledger: Ledger) -> dict[str, tuple[str, list[str]]]:
    """Studies whose state does not fit the states of their trials."""
    with ledger.reading() as transaction:
        views_ = views.study_views(transaction, {})
    final, odd = {"done", "failed", "cancelled"}, {}
    for view in views_:
        ended = [trial.state in final for trial in view.trials]
        if all(ended) != (view.state in final):
            odd[view.study] = (view.state, [trial.state for trial in view.trials])
    return odd


def changing(ledger: Ledger, command, target: str):
    return lambda: ledger.retried(lambda transaction: command(transaction, target, "ann", 2.0))


def test_cancelling_all_trials_at_once_ends_their_study(house):
    for turn in range(5):
        trials = [plan(f"{turn}-{i}", identity=f"{turn}{i}" * 32) for i in range(6)]
        study, _ = house.submit(*trials)
        at_once(
            *(
                changing(house.ledger, commands.cancel_trial, f"{study}-{i:03d}")
                for i in range(len(trials))
            )
        )
        assert contradictions(house.ledger) == {}


def test_people_and_the_loop_that_steer_one_study_at_once_leave_no_contradiction(house):
    for turn in range(4):
        trials = [plan(f"{turn}-{i}", identity=f"{turn}{i}" * 32) for i in range(4)]
        study, _ = house.submit(*trials)
        names = [f"{study}-{i:03d}" for i in range(4)]
        at_once(
            *(
                changing(house.ledger, command, study)
                for command in (
                    commands.cancel_study,
                    commands.retry_study,
                    commands.pause_study,
                    commands.resume_study,
                    commands.cancel_study,
                )
            ),
            *(changing(house.ledger, commands.retry_trial, name) for name in names),
            *(changing(house.ledger, commands.cancel_trial, name) for name in names),
            partial(attempts.start_attempt, house.ledger, names[0], 2.0, "free"),
            partial(give_up, house.ledger, study, names[1:2], "person", "no", 2.0),
        )
        assert contradictions(house.ledger) == {}
        with house.ledger.reading() as transaction:
            (view,) = views.study_views(transaction, {}, study)
        if view.state == "cancelled":
            assert not [trial for trial in view.trials if trial.state == "queued"]


def test_equal_posts_at_once_are_one_study(house):
    answers = at_once(*(lambda: house.submit(plan("a"), idempotency_key="k") for _ in range(20)))
    assert len({study for study, _ in answers}) == 1
    assert sorted(created for _, created in answers) == [False] * 19 + [True]


def test_cancelling_any_number_of_trials_takes_the_same_few_statements(house, told):
    counts = []
    for size in (3, 30):
        trials = [plan(f"{i}", identity=f"{size:02d}{i:02d}" * 16) for i in range(size)]
        study, _ = house.submit(*trials)
        with house.ledger.writing() as transaction:
            move_trial(transaction, f"{study}-000", ["queued"], state="running", attempts=1)
        told.clear()
        with house.ledger.writing() as transaction:
            assert commands.cancel_study(transaction, study, "ann", 2.0)
        counts.append(len(told))
        with house.ledger.writing() as transaction:
            assert not commands.cancel_study(transaction, study, "ann", 2.0)
        with house.ledger.reading() as transaction:
            (view,) = views.study_views(transaction, {}, study)
            events = [row for row in queries.events_after(transaction, 0, study) if row.trial]
        assert [trial.state for trial in view.trials] == ["stopping"] + ["cancelled"] * (size - 1)
        assert sorted(row.trial for row in events) == [trial.trial for trial in view.trials]
        assert {row.cause for row in events} == {"by ann, before it ran", "cancelled by ann"}
    assert counts[0] == counts[1] <= 8


def test_ending_any_number_of_trials_counts_their_study_once(house, told):
    for size in (3, 30):
        trials = [plan(f"{i}", identity=f"{size:02d}{i:02d}" * 16) for i in range(size)]
        never, _ = house.submit(*trials)
        twin, _ = house.submit(*trials)
        names = [f"{never}-{i:03d}" for i in range(size)]
        told.clear()
        give_up(house.ledger, never, names, "budget", "spent", 2.0)
        assert sum("count(" in statement for statement in told) == 1
        with house.ledger.writing() as transaction:
            done = {"state": "done", "metrics": {"segm/AP": 0.5}}
            transaction.execute(update(TRIALS).where(TRIALS.c.study == never).values(done))
        told.clear()
        take_finished(house.ledger, 3.0)
        assert sum("count(" in statement for statement in told) == 1
        with house.ledger.reading() as transaction:
            (view,) = views.study_views(transaction, {}, twin)
            events = queries.events_after(transaction, 0, never)
        assert (view.state, view.counts) == ("done", {"done": size})
        assert [trial.cached_from for trial in view.trials] == names
        assert [row.trial for row in events if row.cause == "spent"] == names


def test_rows_that_contradict_each_other_are_mended_and_told(house):
    ids = [
        house.submit(*(plan(f"{n}-{i}", identity=f"{n}{i}" * 32) for i in range(2)))[0]
        for n in range(4)
    ]
    active, queued, lost, sound = ids
    with house.ledger.writing() as transaction:
        transaction.execute(update(TRIALS).where(TRIALS.c.study == active).values(state="done"))
        transaction.execute(update(STUDIES).where(STUDIES.c.id == queued).values(state="cancelled"))
        transaction.execute(
            update(TRIALS).where(TRIALS.c.id == f"{lost}-000").values(state="running", attempts=1)
        )
    assert sweep.mend(house.ledger, 5.0) == 3
    assert sweep.mend(house.ledger, 6.0) == 0
    with house.ledger.reading() as transaction:
        seen = {view.study: view for view in views.study_views(transaction, {})}
        told = [row.cause for row in queries.events_after(transaction, 0) if row.kind == "mended"]
    assert (seen[active].state, seen[sound].state) == ("done", "active")
    assert [trial.state for trial in seen[queued].trials] == ["cancelled"] * 2
    assert [trial.state for trial in seen[lost].trials] == ["queued"] * 2
    assert sorted(told) == [
        "waited in a study that is over: cancelled",
        "waited in a study that is over: cancelled",
        "was live and had no attempt any more: waits again",
    ]
