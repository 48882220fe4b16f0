"""deploy/: what Kubernetes, Slurm, nginx and Prometheus get names what there is."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.schedule.measures import Measures
from orchestrator.server.front.metrics import exposition
from orchestrator.settings import ServiceSettings
from tests.orchestrator.fake_hub import FakeHub
from tests.test_compose import load, read

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy/kuberay"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(KUBERAY.glob("*.yaml")):
        if path.name not in ("kustomization.yaml", "settings.yaml"):
            for document in yaml.safe_load_all(path.read_text()):
                yield path.name, document


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for _, document in documents():
        spec = document.get("spec", {})
        for part in (spec, spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])):
            if "template" in part:
                yield f"{document['kind']} {document['metadata']['name']}", part["template"]["spec"]


def test_pods_are_no_root_bounded_pinned_and_checked():
    names = [name for name, _ in pods()]
    assert len(names) == 5
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert re.search(r":\S*\d+\.\d+", container["image"]), name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            if "RayCluster" not in name and container["name"] != "databases":
                # KubeRay gives its pods probes of its own
                assert container["readinessProbe"]["exec"]
                assert container["livenessProbe"]["exec"]


def test_each_pod_gets_the_secrets_of_its_part_in_compose():
    compose = read("docker-compose.yml")["services"]
    parts = {"service": "service", "mlflow": "mlflow", "maskray": "ray-head"}
    for name, pod in pods():
        (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
        given = {item["key"] for item in volume["secret"]["items"]}
        assert {item["path"] for item in volume["secret"]["items"]} == given
        part = parts.get(name.split()[1])
        wanted = compose[part]["secrets"] if part else compose["databases"]["secrets"]
        assert given == set(wanted), name
        assert volume["secret"]["defaultMode"] == 0o440
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if variable["value"].startswith("/run/secrets/"):
                    assert variable["value"].removeprefix("/run/secrets/") in given


def test_what_kustomize_lists_is_there_and_the_settings_are_ours():
    listed = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
    files = {path.name for path in KUBERAY.glob("*.yaml")} - {"kustomization.yaml", "settings.yaml"}
    assert set(listed["resources"]) == files
    settings = yaml.safe_load((KUBERAY / "settings.yaml").read_text())
    ServiceSettings.model_validate(settings)
    pinned = (ROOT / "constraints.txt").read_text()
    (ray,) = [document for _, document in documents() if document["kind"] == "RayCluster"]
    assert f"ray=={ray['spec']['rayVersion']}\n" in pinned
    for name, pod in pods():
        for container in pod["containers"]:
            for probe in ("readinessProbe", "livenessProbe"):
                words = container.get(probe, {}).get("exec", {}).get("command", [])
                if "healthy.py" in " ".join(words):
                    assert words[2] in load("healthy").PARTS, name


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which asks no server")
def test_kustomize_builds_it():
    command = ["kubectl", "kustomize", str(KUBERAY)]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = [document["kind"] for document in yaml.safe_load_all(built)]
    assert {"RayCluster", "Deployment", "StatefulSet", "NetworkPolicy", "ConfigMap"} <= set(kinds)


def test_the_dashboard_and_the_alerts_ask_for_what_metrics_says(tmp_path):
    hub = FakeHub(tmp_path)
    measures = Measures()
    measures.attempts.labels("node").inc()
    hub.measures = lambda: measures  # type: ignore[method-assign]
    text = exposition(hub).decode()
    hub.ledger.close()
    # a measurement without a value so far has its type alone
    known = set(re.findall(r"^(?:# TYPE )?(maskray_\w+)", text, re.MULTILINE))
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    asked += [rule["expr"] for rule in rules]
    assert all(rule["annotations"]["summary"] and rule["for"] for rule in rules)
    # without it, measurements of other labels never meet
    assert not [query for query in asked if re.search(r" (and|or|unless) (?!on ?\()", query)]
    names = set(re.findall(r"maskray_\w+", " ".join(asked)))
    assert len(names) > 7
    assert names <= known


FAKE = """#!/bin/bash
name=${0##*/}
echo "$name $* [${MASKRAY_TOKEN-} ${RAY_AUTH_TOKEN-}]" >> "$MASKRAY_STATE/log"
case $name in
  srun) while [[ $1 == --* ]]; do shift; done; exec "$@" ;;
  scontrol) [ "$1" != show ] || echo node-1 ;;
  hostname) echo 127.0.0.1 ;;
  python) [ "$1" = -c ] && echo a-token-of-20-letters ;; # and no drain.py works
  maskray) # the time is up as soon as the script listens for that
    until (( 0x$(awk '/SigCgt/ { print $2 }' /proc/$PPID/status) & 0x200 )); do sleep 0.05; done
    kill -USR1 $PPID
    while kill -0 $PPID; do sleep 0.05; done ;;
esac
"""


def test_the_script_of_slurm_starts_a_service_with_a_token_and_goes_back_into_the_queue(tmp_path):
    script = ROOT / "deploy/slurm/maskray.sbatch"
    for name in ("srun", "scontrol", "hostname", "python", "ray", "maskray"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o700)
    own = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MASKRAY_STATE": str(tmp_path / "state"),
        "MASKRAY_BIN": str(tmp_path),
        "MASKRAY_DEPLOY": str(script.parent),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    subprocess.run(["bash", script], env=own, stderr=subprocess.DEVNULL, check=False)
    called = (tmp_path / "state/log").read_text().splitlines()
    assert called[-1] == "scontrol requeue 17 [ ]"
    [service] = [line for line in called if line.startswith("maskray serve")]
    assert service.endswith("[a-token-of-20-letters a-token-of-20-letters]")
    assert all(line.endswith("[ ]") for line in called if line != service)
    text = script.read_text()
    assert "#SBATCH --requeue" in text
    (margin,) = re.findall(r"--signal=B:USR1@(\d+)", text)
    (drain,) = re.findall(r"drain.py\" \"\$address:\$ray_port\" (\d+)", text)
    assert int(margin) > int(drain) > ServiceSettings(home="x").grace_s + 15


def test_a_drain_waits_for_trials_and_not_for_the_dashboard():
    from ray.core.generated.gcs_pb2 import JobTableData

    source = (ROOT / "deploy/slurm/drain.py").read_text()
    drain: dict[str, Any] = {"__name__": "drain"}
    exec(source, drain)  # it is in no package

    class Fake:
        def get_all_job_info(self) -> dict[int, Any]:
            jobs = [JobTableData(is_dead=dead) for dead in (False, True, False)]
            jobs[0].config.ray_namespace = "_ray_internal_dashboard"
            return dict(enumerate(jobs))

    assert drain["_jobs"](Fake()) == 1


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of one's own for 127.0.0.1, and its key."""
    crt, key = folder / "tls_certificate", folder / "tls_key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(crt)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return crt, key


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_certificates_of_one_s_own_count(tmp_path, monkeypatch):
    """The service with a certificate, and a client that trusts it by SSL_CERT_FILE alone."""
    from orchestrator.client import Client, Connection
    from orchestrator.server.api import build_app
    from orchestrator.server.front.listener import build_server
    from tests.orchestrator.server.front.test_front import House

    crt, key = certificate(tmp_path)

    class Secure(House):
        def __init__(self, home: Path) -> None:
            self.hub = FakeHub(home, tls_certificate=str(crt), tls_key=str(key))
            self.server = build_server(build_app(self.hub, "1"), self.hub.settings)
            self.listen()

        def close(self) -> None:
            self.stop()

    house = Secure(tmp_path)
    connection = Connection(f"https://127.0.0.1:{house.port}", "token-of-ann")
    try:
        with (
            pytest.raises(RuntimeError, match="certificate verify failed"),
            Client(connection) as c,
        ):
            c.info()
        monkeypatch.setenv("SSL_CERT_FILE", str(crt))
        with Client(connection) as client:
            assert client.info().user == "ann"
    finally:
        house.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"SSL_CERT_FILE: .*absent"):
        Client(connection)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_the_proxy_speaks_tls_for_the_service(tmp_path, monkeypatch):
    from tests.orchestrator.server.front.test_front import House

    crt, key = certificate(tmp_path)
    house = House(tmp_path)
    port = free_port()
    text = (ROOT / "deploy/nginx.conf").read_text()
    for old, new in (
        ("/tmp/", f"{tmp_path}/"),  # first: the other paths are below it
        ("/run/secrets/tls_certificate", str(crt)),
        ("/run/secrets/tls_key", str(key)),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("listen 8444", f"listen 127.0.0.1:{free_port()}"),
        ("http://service:8270", house.url),
        ("http://mlflow:5000", house.url),
    ):
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    command = ["nginx", "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
    proxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        context = ssl.create_default_context(cafile=str(crt))
        status = _asked(port, context, "GET /v1/queue", "token-of-ann")
        assert status == 200
        # refused before the body comes, through the proxy too
        assert _asked(port, context, "POST /v1/studies", "wrong", 200_000_000) == 401
    finally:
        proxy.terminate()
        proxy.wait(20)
        house.close()


def _asked(port: int, context: ssl.SSLContext, what: str, token: str, length: int = 0) -> int:
    head = f"{what} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    for _ in range(100):
        try:
            plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.1)
            continue
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(head.encode())
            return int(connection.recv(4096).split()[1])
    raise AssertionError("the proxy does not listen")
