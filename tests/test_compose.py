"""The compose files keep their promises: what listens, who gets which secret, what programs know.

Docker does not run here. tests/test_topology.py runs the same programs without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.command import run_app
from orchestrator.settings import ServiceSettings

ROOT = Path(__file__).parent.parent
MAIN, WORKER = "docker-compose.yml", "deploy/worker-host.yml"
OVERRIDES = ("deploy/several-hosts.yml", "deploy/tls.yml")  # they change services of the first
FILES = (MAIN, WORKER, *OVERRIDES)
ONCE = {"databases", "buckets"}  # they initialise, and end
NODES = {"ray-head", "ray-worker", "ray-worker-gpu"}  # where trials run
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|KEY|CREDENTIALS")


class Loader(yaml.SafeLoader):
    """YAML with compose's own tag, which takes a list of the first file away."""


Loader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def read(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(), Loader)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read(MAIN)


def parts() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for file in FILES:
        for name, service in read(file)["services"].items():
            yield file, name, service


def substituted(text: str) -> list[str]:
    """A command's words, each variable with its default or a stand-in."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    return shlex.split(re.sub(r"\$\{[^}]*\}", "10.0.0.5", text))


def commands() -> Iterator[list[str]]:
    for _, _, service in parts():
        if isinstance(service.get("command"), str):
            yield substituted(service["command"])
        if "healthcheck" in service:
            yield substituted(shlex.join(service["healthcheck"]["test"][1:]))


def test_the_parts_of_the_system_are_there(compose):
    own = {"postgres", "s3", "mlflow", "service"}
    assert set(compose["services"]) == own | NODES | ONCE
    assert compose["services"]["ray-worker"]["profiles"] == ["cpu"]
    gpu = compose["services"]["ray-worker-gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_ports_are_published_on_one_address_alone():
    ports = [port for *_, service in parts() for port in service.get("ports", [])]
    assert len(ports) == 6
    pattern = r"\$\{MASKRAY_(ADDRESS|LISTEN):-127\.0\.0\.1\}:\d+:\d+$"
    assert all(re.match(pattern, port) for port in ports)


def test_the_service_believes_no_address_but_what_its_proxy_says():
    tls = read("deploy/tls.yml")
    (subnet,) = tls["networks"]["front"]["ipam"]["config"]
    assert tls["services"]["service"]["environment"]["FORWARDED_ALLOW_IPS"] == subnet["subnet"]
    inside = {name for *_, name, service in parts() if "front" in service.get("networks", [])}
    assert inside == {"proxy", "service", "mlflow"}
    assert tls["services"]["proxy"]["networks"] == ["front"]


def test_what_runs_on_is_checked_and_bounded(compose):
    for name, service in [*compose["services"].items(), *read(WORKER)["services"].items()]:
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert (service["restart"] == "no") == (name in ONCE)
        if name not in ONCE:
            assert service["healthcheck"]["test"][0] == "CMD"
            assert service["healthcheck"]["start_period"]


def test_nobody_is_root_and_images_are_pinned():
    for file, name, service in parts():
        if file in OVERRIDES and "image" not in service:
            continue
        assert service["user"].startswith("${MASKRAY_UID:?"), name
        assert service["cap_drop"] == ["ALL"]
        assert re.search(r":\S*\d+[.-]\d+\S*$", service["image"]), name
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER maskray" in lines
    assert re.fullmatch(r"FROM python:\d+\.\d+\.\d+-\S+", next(s for s in lines if "FROM" in s))


def test_secrets_are_files_that_make_secrets_makes(compose, tmp_path):
    text = "".join((ROOT / file).read_text() for file in FILES)
    assert not re.search(r"\$\{\w*(?:TOKEN|PASSWORD)", text)
    for _, name, service in parts():
        for variable, value in (service.get("environment") or {}).items():
            if SECRET.search(variable):
                assert re.search("_(FILE|PATH)$", variable), name
                assert value.startswith("/run/secrets/")
                assert value.removeprefix("/run/secrets/") in service["secrets"]
        own = compose["secrets"].keys() | {"tls_certificate", "tls_key"}  # a person's own
        assert set(service.get("secrets", [])) <= own
    program = ROOT / "deploy/compose/make_secrets.py"
    command = [sys.executable, "-I", str(program)]

    def make() -> dict[str, str]:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        files = (tmp_path / ".compose/secrets").iterdir()
        return {file.name: file.read_text() for file in files}

    made = make()
    for name, source in compose["secrets"].items():
        assert (tmp_path / source["file"]).stat().st_mode & 0o777 == 0o600, name
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            if isinstance(volume, dict):
                assert (tmp_path / volume["source"]).is_dir()
    assert "MASKRAY_UID=" in (tmp_path / ".env").read_text()
    assert make() == made
    (tmp_path / ".compose/secrets/ledger_password").unlink()
    changed = make()
    differ = {name for name in made if made[name] != changed[name]}
    assert differ == {"ledger_password", "ledger_url"}
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {".compose/", ".env"} <= set(ignored)
    assert ".compose" in (ROOT / ".dockerignore").read_text().split()


def test_trials_reach_neither_the_ledger_nor_an_administrator(compose):
    services = compose["services"]
    assert services["postgres"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"]
    for name in NODES:
        assert services[name]["networks"] == ["cluster"]
        assert services[name]["secrets"] == ["ray_token", "s3_studies.ini"]
        assert not any("data/" in str(volume) for volume in services[name]["volumes"])
    for service in read(WORKER)["services"].values():
        assert service["secrets"] == ["ray_token", "s3_studies.ini"]


def test_a_node_waits_for_the_last_checkpoints_of_its_trials(compose):
    settings = ServiceSettings.model_validate(yaml.safe_load(settings_text()))
    for name in NODES:
        wait_s = int(compose["services"][name]["stop_grace_period"].removesuffix("s"))
        assert wait_s > settings.grace_s + 15


def settings_text() -> str:
    return (ROOT / "deploy/compose/service.yaml").read_text()


def test_the_service_has_roots_and_no_secret_in_its_settings(compose):
    settings = yaml.safe_load(settings_text())
    assert settings["roots"] == ["s3://studies", "/data"]
    secrets = compose["services"]["service"]["secrets"]
    for name, value in settings.items():
        if name.endswith("_file"):
            assert value.removeprefix("/run/secrets/") in secrets
    assert not re.search("://[^ ]*:[^ ]*@", settings_text())


def test_what_a_service_waits_for_exists_and_ends_or_is_checked(compose):
    for service in compose["services"].values():
        for name, condition in service.get("depends_on", {}).items():
            ends = name in ONCE
            wanted = "service_completed_successfully" if ends else "service_healthy"
            assert condition == {"condition": wanted}
            assert name in compose["services"]


@pytest.fixture(scope="module")
def mlflow_server() -> Any:
    """The command, which warns of libraries of its own when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("mlflow.cli").server


def test_every_program_knows_its_options(mlflow_server, capsys):
    from ray.scripts.scripts import start as ray_start

    programs = set()
    for words in commands():
        program = " ".join(word for word in words[:2] if not word.startswith("-"))
        programs.add(program)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "maskray":
            assert run_app(importlib.import_module("orchestrator.cli.app").app,
                           [*words[1:], "--check"], "maskray") == 0  # fmt: skip
        elif program == "ray start":
            assert options <= {name for option in ray_start.params for name in option.opts}
        elif program.endswith("start_mlflow.py"):
            assert options <= {name for option in mlflow_server.params for name in option.opts}
        elif program.endswith("healthy.py"):
            assert words[2] in load("healthy").PARTS
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
    of_others = {"mc ready", "server /data", "pg_isready", "nginx", "curl"}
    ours = {name for name in programs if not name.startswith("python")} - of_others
    assert ours == {"maskray serve", "ray start"}


def load(name: str) -> Any:
    path = ROOT / f"deploy/compose/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variable_is_known_to_its_program(mlflow_server):
    import mlflow.environment_variables
    import pyarrow
    import ray

    held = {
        "RAY_": (Path(ray.__file__).parent / "_raylet.so").read_bytes(),
        "AWS_": b"".join(
            path.read_bytes() for path in Path(pyarrow.__file__).parent.glob("libarrow.so*")
        ),
    }
    own = {"HOME", "MC_CONFIG_DIR", "PGDATA", "MASKRAY_NODE_ADDRESS", "FORWARDED_ALLOW_IPS"}
    elsewhere = ("POSTGRES_", "MINIO_")  # of images that cannot be asked here; see docs/deploy.md
    for _, name, service in parts():
        for variable in service.get("environment") or {}:
            if variable in own or variable.startswith(elsewhere):
                continue
            if variable.startswith("MLFLOW_"):
                assert hasattr(mlflow.environment_variables, variable), name
                continue
            if variable == "RAY_USAGE_STATS_ENABLED":
                import ray._common.usage.usage_constants as usage

                assert variable == usage.USAGE_STATS_ENABLED_ENV_VAR
                continue
            assert variable.removeprefix("RAY_").encode() in held[variable[:4]], variable
    started = (ROOT / "deploy/compose/start_mlflow.py").read_text()
    of_options = {option.envvar for option in mlflow_server.params}
    for variable in set(re.findall(r'"(MLFLOW_\w+)"', started)) - of_options:
        assert hasattr(mlflow.environment_variables, variable), variable


def test_the_image_has_what_its_programs_import():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    rooms = {"contract", "model", "pipelines", "workers", "orchestrator", "studies", "deploy"}
    assert rooms <= {line.split()[-1] for line in lines if line.startswith("COPY")}
    assert "ARG EXTRAS=deploy" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("mlflow[auth]") for one in project["optional-dependencies"]["deploy"])
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    # `mlflow server --app-name basic-auth` ends at once without the first two
    assert {"flask-wtf", "wtforms", "boto3", "psycopg", "psycopg-binary"} <= pinned
    for module in ("flask_wtf", "boto3", "psycopg"):
        assert importlib.util.find_spec(module), module
