"""The loop against a cluster made of a dict.

Every end of an attempt, and a service that dies at any point.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from contract.attempt import LIVE_ATTEMPTS, AttemptSpec, Outcome, Progress, Result
from contract.study import TRAINING_TAG, Resources
from orchestrator.cluster.jobs import Job, JobRefusedError, UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import commands, queries
from orchestrator.ledger.changes import set_parent_run
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS
from orchestrator.schedule.reconcile import Reconciler
from orchestrator.server import accept
from orchestrator.settings import Limits, ServiceSettings
from tests.orchestrator.submissions import identity, plan, submission


class DiedError(BaseException):
    """The service was killed here. No code of ours may catch it."""


class FakeCluster:
    """Ray as the loop sees it.

    At the `die_in`th call the service dies, before or after it took effect.
    """

    def __init__(self, cpus: float = 2.0) -> None:
        self.cpus = cpus
        self.alive: dict[str, Job] = {}
        self.specs: dict[str, AttemptSpec] = {}
        self.stops: list[str] = []
        self.down = False
        self.die_in = -1
        self.die_before = False
        self.started: list[str] = []

    def _called(self, effect: Callable[[], Any]) -> Any:
        if self.down:
            raise UnreachableError("down")
        self.die_in -= 1
        if self.die_in == 0 and self.die_before:
            raise DiedError
        result = effect()
        if self.die_in == 0:
            raise DiedError
        return result

    def session(self) -> str:
        return str(self._called(lambda: "session"))

    def nodes(self) -> list[Node]:
        used = sum(job.state == "RUNNING" and self.spoke(name) for name, job in self.alive.items())
        return [Node("n", {"CPU": self.cpus}, {"CPU": self.cpus - used})]

    def spoke(self, submission_id: str) -> bool:
        if submission_id not in self.specs:
            return False
        spec = self.specs[submission_id]
        progress = Path(spec.storage, "progress.json")
        return progress.exists() and json.loads(progress.read_text())["attempt"] == spec.attempt

    def jobs(self) -> dict[str, Job]:
        return dict(self._called(lambda: dict(self.alive)))

    def submit(
        self,
        submission_id: str,
        entry: str,
        environment: Mapping[str, str],
        package: str,
        metadata: Mapping[str, str],
    ) -> None:
        def effect() -> None:
            if submission_id not in self.alive:
                self.alive[submission_id] = Job(submission_id, "RUNNING", "", None, "n", metadata)
                data = json.loads(Path(entry.split("--spec ")[1]).read_text())
                del data["run"]  # the code package checks it
                self.specs[submission_id] = AttemptSpec.model_validate(data)
                self.started.append(submission_id)

        self._called(effect)

    def stop(self, submission_id: str) -> None:
        self._called(lambda: self.stops.append(submission_id))

    def forget(self, submission_id: str) -> None:
        self._called(lambda: self.alive.pop(submission_id, None))

    def log(self, submission_id: str) -> str:
        return str(self._called(lambda: f"log of {submission_id}"))

    # --- what ranks do ---

    def step(self, submission_id: str, step: int) -> None:
        spec = self.specs[submission_id]
        progress = Progress(
            attempt=spec.attempt, step=step, steps=9, phase="training", updated_at=0.0
        )
        Path(spec.storage, "progress.json").write_text(progress.model_dump_json())

    def end(
        self,
        submission_id: str,
        code: int | None = 0,
        outcome: Outcome | None = None,
        done: bool = True,
    ) -> None:
        spec = self.specs[submission_id]
        folder = Path(spec.storage)
        if done and code == 0:
            outcome = Outcome(state="done", step=9)
            made = Result(
                metrics={"segm/AP": 0.5},
                step=9,
                attempt=spec.attempt,
                world_size=1,
                weights_sha256="0" * 64,
            )
            (folder / "result.json").write_text(made.model_dump_json())
        if outcome is not None:
            (folder / f"attempts/{spec.attempt}/outcome.json").write_text(outcome.model_dump_json())
        state = "SUCCEEDED" if code == 0 else "FAILED"
        job = self.alive[submission_id]
        # type: ignore[arg-type]
        self.alive[submission_id] = Job(submission_id, state, "", code, "n", job.metadata)


class House:
    def __init__(self, home: Path, **fields: Any) -> None:
        limits = Limits(backoff_s=0, stall_s=100, **fields.pop("limits", {}))
        self.settings = ServiceSettings(
            home=str(home), mlflow="", ray="http://fake", limits=limits, **fields
        )
        self.ledger: Ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.cluster = FakeCluster()
        self.loop = Reconciler(self.ledger, self.settings)
        self.now = 1000.0

    def submit(self, *plans: Any, **fields: Any) -> str:
        self.now += 1
        return accept.accept(
            self.ledger, self.settings, submission(*plans, **fields), "ann", self.now
        )[0]

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            self.loop.tick(self.cluster, self.now)  # type: ignore[arg-type]

    def trial(self, trial: str) -> Any:
        with self.ledger.reading() as transaction:
            return queries.trial_row(transaction, trial)

    def state(self, trial: str) -> str:
        return str(self.trial(trial).state)

    def kinds(self, trial: str) -> list[str]:
        with self.ledger.reading() as transaction:
            return list(
                transaction.execute(select(EVENTS.c.kind).where(EVENTS.c.trial == trial)).scalars()
            )

    def act(self, action: Callable[..., None], target: str) -> None:
        with self.ledger.writing() as transaction:
            action(transaction, target, "ann", self.now)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.ledger.close()


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


def test_trials_that_differ_in_evaluation_alone_share_one_training(house):
    house.cluster.cpus = 4
    training = {"tags": {TRAINING_TAG: identity("t")}}
    one, other, third, fourth = (
        plan(name, identity(name)).model_copy(update=training) for name in "abcd"
    )
    study = house.submit(one, other)
    first, second = f"{study}-000", f"{study}-001"
    house.tick(2)
    assert house.cluster.started == [f"{first}-1"]
    assert house.loop.admission.waits[second].why == (
        f"shares the training of trial {first}, under way"
    )
    # Its evaluation is refused: the training is there all the same.
    weights = Path(house.trial(first).folder, "artifacts/weights-last.safetensors")
    marker = Path(house.trial(first).folder, "checkpoints/0001-00000009/complete.json")
    for file in (weights, marker):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
    refused = Outcome(state="failed", error_class="person", error="val: no masks", step=9)
    house.cluster.end(f"{first}-1", 2, refused, done=False)
    house.tick(2)
    assert house.state(first) == "failed"
    assert house.cluster.specs[f"{second}-1"].trained == house.trial(first).folder
    assert house.cluster.specs[f"{first}-1"].trained == ""
    # The second took no step, so it left weights and no checkpoint; whoever only evaluates waits
    # for nobody.
    evaluated = Path(house.trial(second).folder, "artifacts/weights-last.safetensors")
    evaluated.parent.mkdir(parents=True)
    evaluated.write_bytes(b"")
    house.cluster.end(f"{second}-1")
    house.tick(2)
    more = house.submit(third, fourth)
    house.tick(2)
    for number in range(2):
        assert house.cluster.specs[f"{more}-00{number}-1"].trained == house.trial(first).folder


def test_the_same_run_twice_is_paid_for_once(house):
    first, second = house.submit(plan("a")), house.submit(plan("b"))
    house.tick()
    assert (
        house.loop.admission.waits[f"{second}-000"].why
        == f"is the same run as trial {first}-000, which waits first"
    )
    house.tick()
    assert (
        house.loop.admission.waits[f"{second}-000"].why
        == f"is the same run as trial {first}-000, under way"
    )
    house.cluster.end(f"{first}-000-1")
    house.tick(2)
    row = house.trial(f"{second}-000")
    assert (row.state, row.cached_from, row.attempts) == ("done", f"{first}-000", 0)


def test_of_the_same_run_twice_the_one_of_higher_priority_runs(house):
    low = house.submit(plan("a"), priority=-5)
    high = house.submit(plan("b"), priority=5)
    house.tick()
    assert (house.state(f"{low}-000"), house.state(f"{high}-000")) == ("queued", "starting")


@pytest.mark.parametrize("resources", [{"CPU": 0}, {"x": float("nan")}, {"x": -1.0}])
def test_a_study_of_unsound_resources_stops_no_other(house, resources):
    bad = house.submit(plan("a", identity("bad")), priority=9)
    with house.ledger.writing() as transaction:  # as an older version let it in
        spec = queries.study_row(transaction, bad).spec_json
        spec["resources"]["custom_per_rank"] = resources
        transaction.execute(update(STUDIES).where(STUDIES.c.id == bad).values(spec=spec))
    good = house.submit(plan("b", identity("good")))
    house.tick()
    assert house.state(f"{good}-000") == "starting"
    assert house.state(f"{bad}-000") == "failed"
    assert house.trial(f"{bad}-000").error.startswith("resources.custom_per_rank")


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


def test_a_spent_budget_ends_the_study(house):
    # type: ignore[method-assign]
    house.cluster.nodes = lambda: [Node("n", {"CPU": 2.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0})]
    fields = {"resources": Resources(ranks=1, gpus_per_rank=1), "gpu_hours": 1.0, "max_parallel": 1}
    study = house.submit(plan("a"), plan("b", identity("b")), **fields)
    house.tick(2)
    house.cluster.step(f"{study}-000-1", 1)
    house.tick()
    house.now += 3700
    house.cluster.step(f"{study}-000-1", 2)
    house.tick(2)
    assert [house.state(f"{study}-00{i}") for i in range(2)] == ["stopping", "cancelled"]
    house.cluster.end(f"{study}-000-1", 76, Outcome(state="stopped", step=2), done=False)
    house.tick()
    assert house.state(f"{study}-000") == "cancelled"
    assert "of its 1 GPU-hours" in house.trial(f"{study}-001").error


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


def test_a_missing_code_package_is_said(house):
    study = house.submit(plan("a"), code="f" * 64)
    house.tick()
    assert "submit the study's code again" in house.loop.admission.waits[f"{study}-000"].why


def test_a_study_waits_for_its_parent_run_but_not_for_ever(tmp_path):
    house = House(tmp_path, mlflow_wait_s=30)
    house.settings = house.settings.model_copy(update={"mlflow": "http://127.0.0.1:1"})
    house.loop = Reconciler(house.ledger, house.settings)
    trial = f"{house.submit(plan('a'))}-000"
    house.tick()
    assert house.loop.admission.waits[trial].why == "waits for the MLflow server"
    house.now += 30
    house.tick()
    assert house.state(trial) == "starting"
    house.ledger.close()


def test_a_trial_waits_for_the_address_of_a_local_mlflow_but_not_for_ever(tmp_path):
    """Without it the trial's records would reach nobody, though its study has a parent run."""
    house = House(tmp_path, mlflow_wait_s=30)
    house.settings = house.settings.model_copy(update={"mlflow": "local"})
    house.loop = Reconciler(house.ledger, house.settings)
    study = house.submit(plan("a"))
    set_parent_run(house.ledger, study, "experiment", "run")
    house.now += 60
    house.tick()
    trial = f"{study}-000"
    assert house.loop.admission.waits[trial].why == "waits for the MLflow server"
    house.loop.tracking_uri = "http://127.0.0.1:5000"
    house.tick()
    assert house.state(trial) == "starting"
    house.ledger.close()


def test_the_head_of_the_queue_becomes_a_capacity_request_until_it_runs(tmp_path):
    house = House(tmp_path, autoscale=True, entry=("python", "-m", "entry"))
    asked: list[Any] = []
    submit = house.cluster.submit

    def watched(submission_id: str, entry: str, *rest: Any) -> None:
        if submission_id.startswith("capacity-"):
            asked.append(json.loads(shlex.split(entry)[-1]))
        else:
            submit(submission_id, entry, *rest)

    house.cluster.submit = watched  # type: ignore[method-assign]
    small = house.submit(plan("small", identity("small")))
    house.tick()
    assert asked == [], "what fits needs no request"
    big = house.submit(plan("big", identity("big")), resources=Resources(ranks=3))
    house.tick(3)
    assert asked == [[{"CPU": 1.0}] * 4], "what runs and the head, once"
    house.cluster.cpus = 4
    house.tick()
    assert house.cluster.started == [f"{small}-000-1", f"{big}-000-1"]
    assert asked[1:] == [[]], "the request is taken back"
    house.ledger.close()


# --- a service that dies anywhere ----------------------------------------------------------------

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


def test_the_queue_keeps_its_order_over_a_restart(house):
    house.cluster.cpus = 1
    low = house.submit(plan("low", identity("low")))
    high = house.submit(plan("high", identity("high")), priority=5)
    with house.ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(queued_at=house.now))
    house.loop = Reconciler(house.ledger, house.settings)
    house.tick()
    assert house.cluster.started == [f"{high}-000-1"]
    house.cluster.end(f"{high}-000-1")
    house.tick(2)
    assert house.cluster.started[-1] == f"{low}-000-1"
