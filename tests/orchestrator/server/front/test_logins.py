"""MLflow's logins: what a lost answer or a refusal of the server may cost."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import STUDIES
from orchestrator.server import accept
from orchestrator.server.front.logins import Logins
from orchestrator.server.mlflow import MLflow, TrackingDownError, TrackingRefusedError
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import plan, submission


class FakeMLflow:
    """lost: a user whose removal is done, and whose answer does not arrive."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.lost = self.refused = ""

    def users(self) -> list[str]:
        return sorted(self.names)

    def experiment(self, name: str, tags: object) -> str:
        return "1"

    def keep_user(self, name: str, password: str, experiment: str) -> None:
        if self.refused and name.endswith(self.refused):
            raise TrackingRefusedError("status 400")
        self.names.add(name)

    def remove_user(self, name: str) -> None:
        self.names.discard(name)
        if self.lost and name.endswith(self.lost):
            self.lost = ""
            raise TrackingDownError("the answer was lost")


def test_a_lost_answer_or_a_refusal_stops_no_other_login(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    names = [accept.accept(ledger, settings, submission(plan("a")), u, 1.0)[0] for u in "abc"]
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(mlflow_run_id="r", mlflow_experiment="e"))
    mlflow, logins = FakeMLflow(), Logins(ledger, tmp_path)

    def keep() -> None:
        logins.keep(mlflow)  # type: ignore[arg-type]

    mlflow.refused = names[0]
    keep()
    assert [logins.made(name) for name in names] == [False, True, True]
    mlflow.refused, mlflow.lost = "", names[1]
    with ledger.writing() as transaction:
        over = update(STUDIES).where(STUDIES.c.id.in_(names[1:]))
        transaction.execute(over.values(state="done", ended_at=2.0))
    with pytest.raises(TrackingDownError):
        keep()
    keep()
    assert [logins.made(name) for name in names] == [True, False, False]
    assert len(mlflow.names) == 1
    ledger.close()


def test_a_user_who_is_gone_is_removed() -> None:
    mlflow = MLflow("http://127.0.0.1:1")
    answers = iter([404, 403])
    transport = httpx.MockTransport(lambda _: httpx.Response(next(answers)))
    mlflow._http = httpx.Client(base_url=mlflow.url, transport=transport)
    mlflow.remove_user("study-x")
    with pytest.raises(TrackingRefusedError):
        mlflow.remove_user("study-x")


def test_a_service_that_starts_again_takes_over_the_login_of_a_study_that_runs() -> None:
    mlflow, refusals = MLflow("http://127.0.0.1:1"), ["RESOURCE_ALREADY_EXISTS", "INVALID"]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/grant"):
            return httpx.Response(400, json={"error_code": refusals.pop(0)})
        return httpx.Response(200, json={"users": [{"username": "study-a"}]})

    mlflow._http = httpx.Client(base_url=mlflow.url, transport=httpx.MockTransport(answer))
    mlflow.keep_user("study-a", "password", "1")
    with pytest.raises(TrackingRefusedError, match="INVALID"):
        mlflow.keep_user("study-a", "password", "1")
    mlflow.close()
