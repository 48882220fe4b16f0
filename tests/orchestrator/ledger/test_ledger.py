"""The ledger on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError

import orchestrator.ledger
from contract.study import Submission
from orchestrator.ledger import attempts, commands, lease, queries
from orchestrator.ledger.changes import end_study_if_over, move_trial, take_finished
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, METADATA, STUDIES, TRIALS
from orchestrator.server import views
from orchestrator.study.proof import PROOF_TAG
from tests.orchestrator.studies import write_dataset
from tests.orchestrator.submissions import plan, submission


def states(ledger: Ledger) -> list[str]:
    with ledger.reading() as transaction:
        return list(transaction.execute(select(TRIALS.c.state).order_by(TRIALS.c.id)).scalars())


def test_migrations_and_tables_agree(ledger):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with ledger.engine.connect() as transaction:
        context = MigrationContext.configure(transaction, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_migrating_twice_changes_nothing(house):
    house.submit(plan("a"))
    house.ledger.migrate()
    assert states(house.ledger) == ["queued"]


def test_a_ledger_of_an_older_version_keeps_its_trials(house):
    """On SQLite a table that is made anew takes with it the rows that refer to it."""
    from alembic import command
    from alembic.config import Config

    house.submit(plan("a"))
    config = Config()
    folder = Path(orchestrator.ledger.__file__).parent
    config.set_main_option("script_location", str(folder / "migrations"))
    with house.ledger.writing() as transaction:
        config.attributes["connection"] = transaction
        command.downgrade(config, "0002")
    house.ledger.migrate()
    assert states(house.ledger) == ["queued"]


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(ledger):
    with ledger.writing() as transaction:
        known = transaction.execute(text("SELECT version_num FROM alembic_version")).scalar()
        transaction.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RuntimeError, match=r"a newer maskray wrote it \(revision 9999, this one"):
        ledger.migrate()
    with ledger.writing() as transaction:
        transaction.execute(text(f"UPDATE alembic_version SET version_num = '{known}'"))
    ledger.migrate()


def test_one_idempotency_key_is_one_study(house):
    first, created = house.submit(plan("a"), idempotency_key="k")
    again, created_again = house.submit(plan("a"), idempotency_key="k")
    assert (created, created_again, first == again) == (True, False, True)
    other, _ = house.submit(plan("a", identity="b" * 64), idempotency_key="")
    assert other != first
    with pytest.raises(
        ValueError, match=f"the key 'k' was used for study {first}, which is another one"
    ):
        house.submit(plan("a", identity="b" * 64), idempotency_key="k")


def test_an_attempt_starts_once_and_only_from_the_queue(house):
    study, _ = house.submit(plan("a"))
    trial = f"{study}-000"
    assert attempts.start_attempt(house.ledger, trial, 1.0, "free") == 1
    assert attempts.start_attempt(house.ledger, trial, 1.0, "free") == 0
    with pytest.raises(IntegrityError), house.ledger.writing() as transaction:
        transaction.execute(
            insert(ATTEMPTS).values(
                trial=trial, number=1, submission_id="other", state="running", started_at=1.0
            )
        )


def test_a_move_names_where_it_starts_and_which_attempt(house):
    study, _ = house.submit(plan("a"))
    trial = f"{study}-000"
    attempts.start_attempt(house.ledger, trial, 1.0, "free")
    with house.ledger.writing() as transaction:
        assert not move_trial(transaction, trial, ["queued"], state="done")
        assert not move_trial(transaction, trial, ["starting"], at_attempt=2, state="done")
        assert move_trial(transaction, trial, ["starting"], at_attempt=1, state="done")
        assert not move_trial(transaction, trial, ["starting"], at_attempt=1, state="failed")


def test_a_study_ends_once_with_its_last_trial(house):
    study, _ = house.submit(plan("a"), plan("b", identity="b" * 64))
    for trial, state, expected in (
        (f"{study}-000", "done", ""),
        (f"{study}-001", "failed", "failed"),
    ):
        with house.ledger.writing() as transaction:
            move_trial(transaction, trial, ["queued"], state=state)
            assert end_study_if_over(transaction, study, 2.0) == expected
            assert end_study_if_over(transaction, study, 2.0) == ""
    with house.ledger.reading() as transaction:
        kinds = list(
            transaction.execute(select(EVENTS.c.kind).where(EVENTS.c.study == study)).scalars()
        )
    assert kinds == ["submitted", "study-failed"]


def test_a_finished_identity_is_taken_unless_the_study_is_fresh(house):
    first, _ = house.submit(plan("a"))
    with house.ledger.writing() as transaction:
        move_trial(transaction, f"{first}-000", ["queued"], state="done", metrics={"segm/AP": 0.5})
    second, _ = house.submit(plan("renamed"))
    fresh, _ = house.submit(plan("a"), fresh=True)
    with house.ledger.reading() as transaction:
        taken = views.study_views(transaction, {}, second)[0]
        assert taken.state == "done"
        assert (taken.trials[0].state, taken.trials[0].cached_from) == ("done", f"{first}-000")
        assert taken.trials[0].metrics == {"segm/AP": 0.5}
        assert taken.trials[0].storage.endswith(f"{first}/{first}-000")
        assert views.study_views(transaction, {}, fresh)[0].trials[0].state == "queued"


def real(data: Path, **fields) -> Submission:
    """A study of one trial on a dataset that the service can read."""
    made = plan("a", identity="a" * 64)
    run = {**made.run, "data": {"train": str(data / "train"), "val": str(data / "val")}}
    return submission(made.model_copy(update={"run": run}), **fields)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"code": "d" * 64}, False),  # a code that prints AP 99
        ({"run": {"seed": 7}}, False),  # another run under the honest identity
        ({"images": 11}, False),  # another dataset
        ({"tags": {PROOF_TAG: "0" * 64}}, True),  # what a client says of it counts for nothing
    ],
)
def test_another_owner_s_result_counts_only_if_the_service_knows_it_is_the_same(
    house, tmp_path, change, taken
):
    data = write_dataset(tmp_path / "data")
    honest = real(data, code="c" * 64)
    forged = honest.trials[0]
    if "images" in change:
        other = write_dataset(tmp_path / "other", images=change["images"])
        forged = real(other).trials[0]
    if "run" in change:
        forged = forged.model_copy(update={"run": {**forged.run, **change["run"]}})
    forged = forged.model_copy(update={"tags": change.get("tags", {})})
    sent = honest.model_copy(update={"trials": (forged,), "code": change.get("code", honest.code)})
    waiting, _ = house.accept(honest, "ann")
    study, _ = house.accept(sent, "mal")
    with house.ledger.writing() as transaction:
        move_trial(transaction, f"{study}-000", ["queued"], state="done", metrics={"bbox/AP": 0.99})
        end_study_if_over(transaction, study, 2.0)
    take_finished(house.ledger, 3.0)  # of what waits already
    after, _ = house.accept(honest, "ann")
    own, _ = house.accept(sent, "mal")
    with house.ledger.reading() as transaction:
        for name in (waiting, after):
            (trial,) = views.study_views(transaction, {}, name)[0].trials
            assert trial.state == ("done" if taken else "queued")
            assert trial.ran_by == ("mal" if taken else "ann")
        (trial,) = views.study_views(transaction, {}, own)[0].trials
        assert (trial.cached_from, trial.ran_by) == (f"{study}-000", "mal")
        events = [event.cause for event in views.events(transaction, 0, after)]
    assert (f"taken from trial {study}-000, run by mal" in events) == taken


def test_without_a_dataset_that_the_service_can_read_results_stay_with_their_owner(house, tmp_path):
    sent = real(tmp_path / "elsewhere", code="c" * 64)
    study, _ = house.accept(sent, "mal")
    with house.ledger.writing() as transaction:
        move_trial(transaction, f"{study}-000", ["queued"], state="done", metrics={"bbox/AP": 0.99})
    other, _ = house.accept(sent, "ann")
    with house.ledger.reading() as transaction:
        assert views.study_views(transaction, {}, other)[0].trials[0].state == "queued"


def test_a_second_service_waits_for_the_lease(ledger):
    now = time.time()
    lease.take_lease(ledger, "first", now)
    with ledger.writing() as transaction:  # a live process elsewhere
        transaction.execute(text("update lease set host = 'elsewhere'"))
    with pytest.raises(RuntimeError, match="holds it for 30 s more"):
        lease.take_lease(ledger, "second", now)
    assert lease.renew_lease(ledger, "first", now)
    lease.take_lease(ledger, "second", now + 31)
    assert not lease.renew_lease(ledger, "first", now + 31), (
        "the first one learns that it lost the ledger"
    )


def test_a_lease_of_a_dead_process_on_this_host_is_free_at_once(ledger):
    now = time.time()
    lease.take_lease(ledger, "first", now)
    with pytest.raises(RuntimeError, match="end that service first"):
        lease.take_lease(ledger, "second", now)
    with ledger.writing() as transaction:
        transaction.execute(text("update lease set process = '999999999@1.00'"))
    lease.take_lease(ledger, "second", now)


def test_commands_move_only_what_can_move(house):
    study, _ = house.submit(plan("a"), plan("b", identity="b" * 64), plan("c", identity="c" * 64))
    first, second, third = (f"{study}-00{i}" for i in range(3))
    attempts.start_attempt(house.ledger, first, 1.0, "free")
    with house.ledger.writing() as transaction:
        assert commands.pause_study(transaction, study, "ann", 1.0)
        assert not commands.pause_study(transaction, study, "ann", 1.0)
    assert states(house.ledger) == ["stopping", "queued", "queued"]
    with house.ledger.writing() as transaction:
        assert queries.waiting_trials(transaction) == []
        assert commands.resume_study(transaction, study, "ann", 2.0)
        assert not commands.resume_study(transaction, study, "ann", 2.0)
        assert [row.id for row in queries.waiting_trials(transaction)] == [second, third]
        assert commands.cancel_trial(transaction, second, "ann", 3.0)
        assert not commands.cancel_trial(transaction, second, "ann", 3.0)
        assert not commands.retry_trial(transaction, first, "ann", 3.0)
        assert commands.cancel_study(transaction, study, "ann", 4.0)
    assert states(house.ledger) == ["stopping", "cancelled", "cancelled"]
    with house.ledger.reading() as transaction:
        assert queries.trial_row(transaction, first).wish == "cancel"
    with house.ledger.writing() as transaction:
        with pytest.raises(ValueError, match="cancel it before"):
            commands.forget_study(transaction, study, "ann", 5.0)
        move_trial(transaction, first, ["stopping"], state="failed")
        assert end_study_if_over(transaction, study, 5.0) == "failed"
        assert not commands.cancel_study(transaction, study, "ann", 6.0)
        assert commands.retry_study(transaction, study, "ann", 6.0)
        assert not commands.retry_study(transaction, study, "ann", 6.0)
    assert states(house.ledger) == ["queued", "queued", "queued"]
    with house.ledger.writing() as transaction:
        assert queries.study_row(transaction, study).state == "active"
        commands.cancel_study(transaction, study, "ann", 7.0)
        commands.forget_study(transaction, study, "ann", 8.0)
        assert views.study_views(transaction, {}) == []
        assert transaction.execute(select(EVENTS.c.kind)).scalars().all() == ["study-forgotten"]


def test_many_trials_are_listed_whole_and_in_order(house):
    studies = [
        house.submit(
            *(plan(f"t{i}", identity=f"{s:02x}{i:062x}") for i in range(500)), name=f"s{s}"
        )[0]
        for s in range(4)
    ]
    with house.ledger.writing() as transaction:
        transaction.execute(update(TRIALS).where(TRIALS.c.position < 250).values(state="done"))
    with house.ledger.reading() as transaction:
        seen = views.study_views(transaction, {})
        assert [len(view.trials) for view in seen] == [500] * 4
        assert [view.study for view in seen] == studies
        assert len(views.queue(transaction, {}).queue) == 1000


def test_an_unknown_server_is_named_without_its_password():
    with pytest.raises(RuntimeError, match=r"\*\*\*@127.0.0.1:1/x.*is the database up") as caught:
        Ledger("postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_studies_of_deleted_rows_leave_no_trials(house):
    study, _ = house.submit(plan("a"))
    with house.ledger.writing() as transaction:
        transaction.execute(STUDIES.delete().where(STUDIES.c.id == study))
    assert states(house.ledger) == []


def test_a_study_of_another_version_is_read_and_its_json_stays_whole(house):
    """A field that this version does not know is left out, a missing one is its default."""
    study, _ = house.submit(plan("a"), max_attempts=7)
    with house.ledger.writing() as transaction:
        spec = dict(queries.study_row(transaction, study).spec_json)
        del spec["max_parallel"]
        spec |= {"contrasts": [{"a": "x"}], "resources": {"ranks": 2, "topology": "ring"}}
        spec["design"] = "latin_square"
        transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(spec=spec))
        row = queries.study_row(transaction, study)
        assert (row.spec.max_attempts, row.spec.max_parallel) == (7, 0)
        assert (row.spec.resources.ranks, row.spec_problem) == (2, "")
        assert views.study_views(transaction, {}, study)[0].spec == spec
        assert views.queue(transaction, {}).queue[0].needs == "2 ranks x 1 CPU"
        with pytest.raises(ValueError, match="design"):
            views.submission_of(transaction, study)
