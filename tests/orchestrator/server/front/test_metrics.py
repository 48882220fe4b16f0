"""/metrics: what Prometheus reads, and who may."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from orchestrator.cluster.nodes import Node
from orchestrator.ledger.changes import move_trial
from orchestrator.schedule.decide import Wait
from orchestrator.schedule.measures import Measures
from orchestrator.server.api import build_app
from orchestrator.server.front.metrics import OTHER, REASONS, STATES, reason_of
from tests.orchestrator.fake_hub import FakeHub, Http, by
from tests.orchestrator.submissions import plan, submission


class Hub(FakeHub):
    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.own = Measures()
        self.own.attempts.labels("node").inc(3)
        self.own.decisions.observe(0.2)
        self.own.ray.observe(0.1)

    def measures(self) -> Measures:
        return self.own

    def nodes(self) -> list[Node]:
        return []  # unknown, so a study may ask for GPUs

    def waits(self) -> dict[str, Wait]:
        return {"a": Wait("a", 0, "is the same run as trial b, under way")}


def samples(http: Http) -> dict[tuple[str, ...], float]:
    answer = http.get("/metrics", headers=by("eve"))
    assert answer.status_code == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_it_counts_trials_waits_attempts_and_gpu_hours(tmp_path):
    hub = Hub(tmp_path)
    http = Http(build_app(hub, "1"))
    assert http.get("/metrics").status_code == 401
    sent = submission(plan("a"), plan("b"), resources={"ranks": 2, "gpus_per_rank": 4})
    study = http.post("/v1/studies", content=sent.model_dump_json(), headers=by("ann")).json()
    name = f"{study['study']}-001"
    with hub.ledger.writing() as transaction:
        move_trial(transaction, name, ["queued"], state="done", rank_seconds=7200.0)
    found = samples(http)
    assert found["maskray_trials", "queued"] == 1
    assert found["maskray_trials", "done"] == 1
    assert {name[1] for name in found if name[0] == "maskray_trials"} == set(STATES)
    assert found["maskray_waiting_trials", "same_run"] == 1
    assert found["maskray_gpu_hours", "ann"] == 8
    assert found["maskray_attempts_total", "node"] == 3
    assert found["maskray_decision_seconds_sum",] == 0.2
    assert found["maskray_ray_seconds_count",] == 1
    assert 0 < found["maskray_ledger_seconds",] < 60
    assert found["maskray_cluster_ready",] == 1
    hub.ledger.close()


def test_every_reason_to_wait_has_a_kind():
    assert reason_of(Wait("t", 3, "needs 2 ranks x 1 GPU", lacks=True)) == "resources"
    assert reason_of(Wait("t", 0, "user ann runs 3 trials, the most a user may")) == "limits"
    assert reason_of(Wait("t", 0, "tries again in 3 s after a failed attempt")) == "backoff"
    assert reason_of(Wait("t", 0, "waits for the MLflow server")) == "mlflow"
    lack = "MLflow has not got all of it (the upload needs room); tried again"
    assert reason_of(Wait("t", 0, lack)) == "mlflow"
    assert reason_of(Wait("t", 0, "3 trials run, the most this service may")) == "limits"
    assert reason_of(Wait("t", 0, "shares the training of trial a-000, under way")) == "same_run"
    assert reason_of(Wait("t", 0, "something new")) == OTHER
    assert OTHER not in REASONS.values()
