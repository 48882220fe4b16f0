"""An app with four users, for all tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.server.api import build_app
from orchestrator.server.front import failures
from tests.orchestrator.fake_hub import FakeHub, Http


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub(tmp_path)
    yield hub
    hub.ledger.close()


@pytest.fixture
def http(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Http:
    monkeypatch.setattr(failures, "_FIRST_S", 0.0)  # test_front.py has the slowing down
    return Http(build_app(hub, "1"))
