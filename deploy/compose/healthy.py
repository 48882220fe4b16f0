"""Whether a part of compose does its work: exit 0, or one line that says what it does not.

`healthy.py ray-head|ray-worker|mlflow|service URL`, in the container of that part.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import httpx

from contract.machine.logins import login_in
from orchestrator.cluster.jobs import Cluster

_PATIENCE_S = 8.0
SECRETS = Path(os.environ.get("MASKRAY_SECRETS", "/run/secrets"))


def ray_head(url: str) -> None:
    """The dashboard answers with this token, and knows what the cluster holds."""
    if not any(machine.is_head for machine in _cluster(url).machines()):
        raise RuntimeError("the head is not among its nodes")


def ray_worker(url: str) -> None:
    """The head counts this node among those that live."""
    own = os.environ.get("MASKRAY_NODE_ADDRESS") or socket.gethostbyname(socket.gethostname())
    if own not in {machine.address for machine in _cluster(url).machines()}:
        raise RuntimeError(f"the head does not know node {own}")


def mlflow(url: str) -> None:
    """The administrator's login is taken, and the database answers. `/health` shows neither."""
    login, body = login_in(SECRETS / "mlflow_login"), {"max_results": 1}
    path = f"{url}/api/2.0/mlflow/experiments/search"
    answer = httpx.post(path, json=body, auth=login, timeout=_PATIENCE_S, trust_env=False)
    answer.raise_for_status()


def service(url: str) -> None:
    """The service answers that its loop turns."""
    httpx.get(f"{url}/v1/health", timeout=_PATIENCE_S, trust_env=False).raise_for_status()


def _cluster(url: str) -> Cluster:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text("utf-8").strip()
    return Cluster(url, token, timeout_s=_PATIENCE_S)


PARTS = {"ray-head": ray_head, "ray-worker": ray_worker, "mlflow": mlflow, "service": service}

if __name__ == "__main__":
    try:
        PARTS[sys.argv[1]](sys.argv[2])
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {' '.join(str(error).split())}")
