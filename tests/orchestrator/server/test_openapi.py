"""Schemathesis on the service's OpenAPI document: no request that it allows is a server error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from orchestrator.server.api import build_app
from tests.orchestrator.fake_hub import FakeHub, Http, by
from tests.orchestrator.submissions import identity, plan, submission


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    hub = FakeHub(tmp_path)
    app = build_app(hub, "1")
    body = submission(plan("a", identity("a"))).model_dump_json()
    assert Http(app).post("/v1/studies", content=body, headers=by("ann")).status_code == 200
    yield app
    hub.ledger.close()


def test_no_request_that_the_description_allows_is_a_server_error(app: FastAPI) -> None:
    """A loop of our own over the operations: Schemathesis' plugin does not know pytest 9."""
    tried = set()
    for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def hold(case: Any) -> None:
            if case.path == "/v1/events":
                case.query["wait_s"] = 0
            case.call_and_validate(headers=by("root"), checks=[not_a_server_error])

        hold()
        tried.add((operation.method, operation.path))
    assert len(tried) >= 20
