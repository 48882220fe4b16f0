"""A local service's own Ray head and MLflow server: found if they live, started if not, ended with everything."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.local.processes import (
    ChildRecord,
    end_child,
    end_processes,
    find_child,
    free_ports,
    marked_processes,
    own_token,
    recorded_child,
    start_child,
)
from orchestrator.local.ray_head import HeadPlan, start_head
from orchestrator.settings import ServiceSettings

_HANGS_S = 180.0  # a head that lives and does not answer for so long is ended


@dataclass(frozen=True)
class Local:
    """What `ensure` found or started."""

    child: ChildRecord
    started: bool
    found_dead: bool = False  # there was one before, and it is gone


def ensure_ray(settings: ServiceSettings) -> Local:
    """The living Ray head of this home. What a dead one left behind is ended first: its ranks may still write."""
    home = Path(settings.home)
    living = find_child("ray", home)
    if living is not None:
        return Local(living, started=False)
    before = recorded_child("ray", home) is not None
    end_ray(settings)
    plan = HeadPlan(
        home=home,
        mark=ray_mark(home),
        token_file=ray_token_file(settings),
        cpus=local_cpus(settings),
        gpus=settings.ray_gpus,
        memory_mib=settings.ray_memory_mib,
        resources=settings.ray_resources,
    )
    own_token(plan.token_file)
    return Local(start_head(plan), started=True, found_dead=before)


def end_ray(settings: ServiceSettings, wait_s: float = 5.0) -> None:
    """Ends this home's head, and every process that it or a job of it started."""
    home = Path(settings.home)
    children = marked_processes(ray_mark(home))
    end_child("ray", home, wait_s)
    end_processes([process for process in children if process.is_running()], wait_s)
    end_processes(marked_processes(ray_mark(home)), wait_s)


def ensure_mlflow(settings: ServiceSettings) -> Local:
    """The living MLflow server of this home, on SQLite, artifacts in a folder beside it."""
    home = Path(settings.home)
    living = find_child("mlflow", home)
    if living is not None:
        return Local(living, started=False)
    before = recorded_child("mlflow", home)
    end_mlflow(settings)
    # The same port as before: running trials know the address.
    port = int(before.url.rsplit(":", 1)[1]) if before is not None else free_ports(1)[0]
    return Local(start_mlflow(home, port), started=True, found_dead=before is not None)


def start_mlflow(home: Path, port: int) -> ChildRecord:
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "MASKRAY_"))
        },
        "MASKRAY_MARK": mlflow_mark(home),
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "40",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "mlartifacts"),
    ]  # fmt: skip
    return start_child("mlflow", command, environment, home, url=f"http://127.0.0.1:{port}")


def end_mlflow(settings: ServiceSettings, wait_s: float = 5.0) -> None:
    home = Path(settings.home)
    children = marked_processes(mlflow_mark(home))
    end_child("mlflow", home, wait_s)
    end_processes([process for process in children if process.is_running()], wait_s)


def local_cpus(settings: ServiceSettings) -> int:
    return settings.ray_cpus or len(os.sched_getaffinity(0))


def ray_mark(home: Path) -> str:
    return f"ray:{home}"


def mlflow_mark(home: Path) -> str:
    return f"mlflow:{home}"


def ray_token_file(settings: ServiceSettings) -> Path:
    return (
        Path(settings.ray_token_file)
        if settings.ray_token_file
        else Path(settings.home) / "ray-token"
    )


class Patience:
    """Tells a head that is starting or busy from one that hangs."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def answered(self) -> None:
        self._since = time.monotonic()

    def over(self) -> bool:
        return time.monotonic() - self._since > _HANGS_S
