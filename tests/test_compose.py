"""The compose file keeps its promises: closed ports, no default secrets, health checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_the_parts_of_the_system_are_there(compose):
    assert set(compose["services"]) == {"mlflow", "ray-head", "ray-worker", "service"}


def test_ports_are_published_on_this_machine_alone(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_service_has_a_health_check(compose):
    assert all("test" in service["healthcheck"] for service in compose["services"].values())


def test_secrets_have_no_default(compose):
    text = (ROOT / "docker-compose.yml").read_text()
    secrets = re.findall(r"\$\{(\w*(?:TOKEN|PASSWORD|SECRET)\w*)([^}]*)\}", text)
    assert {name for name, _ in secrets} >= {
        "MASKRAY_TOKEN",
        "MASKRAY_RAY_TOKEN",
        "MLFLOW_ADMIN_PASSWORD",
    }
    assert all(rest.startswith(":?") for _, rest in secrets), "a missing secret must stop compose"


def test_ray_asks_for_a_token(compose):
    for name in ("ray-head", "ray-worker", "service"):
        assert compose["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_what_a_service_waits_for_exists_and_is_checked(compose):
    for service in compose["services"].values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert name in compose["services"]


def test_the_image_copies_the_four_rooms_and_runs_as_a_user():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {line.split()[-1] for line in lines if line.startswith("COPY")}
    assert {"model", "pipelines", "workers", "orchestrator", "studies"} <= copied
    assert "USER maskray" in lines
    assert all(
        (ROOT / source).exists()
        for line in lines
        if line.startswith("COPY")
        for source in line.split()[2:-1]
    )


def test_the_commands_are_ours(compose):
    """The options in the compose file are accepted by the installed command."""
    from contract.command import run_app
    from orchestrator.cli.app import app

    words = compose["services"]["service"]["command"].split()
    assert words[:2] == ["maskray", "serve"]
    assert run_app(app, [*words[1:], "--check"], "maskray") == 0
