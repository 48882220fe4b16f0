"""Which waiting trials start, and why the others wait: the loop against a fake cluster."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from contract.attempt import Outcome
from contract.study import TRAINING_TAG, Resources
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import queries
from orchestrator.ledger.changes import set_parent_run
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.schedule.reconcile import Reconciler
from tests.orchestrator.fake_cluster import House
from tests.orchestrator.submissions import identity, plan


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
