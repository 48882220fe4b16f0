"""A local service's own Ray head and MLflow server: found if they live, started if not."""

from __future__ import annotations

import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from contract.machine.logins import configuration_of, login_in
from orchestrator.cluster.nodes import Node
from orchestrator.local.processes import (
    ChildRecord,
    end_child,
    end_processes,
    find_child,
    free_ports,
    marked,
    marked_processes,
    own_token,
    recorded_child,
    start_child,
    write_private,
)
from orchestrator.local.ray_head import HeadPlan, start_head
from orchestrator.settings import ServiceSettings

_HANGS_S = 180.0  # a head that lives and does not answer for so long is ended


@dataclass(frozen=True)
class Ensured:
    """A process that lives now."""

    child: ChildRecord
    started: bool  # just now
    replaced: bool = False  # one of an earlier time was recorded, and it is dead


def ensure_ray(settings: ServiceSettings) -> Ensured:
    """The living Ray head of this home, started if there is none."""
    home = Path(settings.home)
    living = find_child("ray", home)
    if living is not None:
        return Ensured(living, started=False)
    replaced = recorded_child("ray", home) is not None
    end_ray(settings)  # what a dead head left behind: its ranks may still write
    plan = HeadPlan(
        home=home,
        mark=ray_mark(home),
        token_file=ray_token_file(settings),
        cpus=local_cpus(settings),
        gpus=settings.ray_gpus,
        memory_mib=settings.ray_memory_mib,
        resources=settings.ray_resources,
        # a trial gets a login of its study; the service's own is an administrator's
        hidden=("MLFLOW_TRACKING_",) if settings.mlflow_login_file else (),
    )
    own_token(plan.token_file)  # Ray reads the file when it starts
    return Ensured(start_head(plan), started=True, replaced=replaced)


def end_ray(settings: ServiceSettings, wait_s: float = 5.0) -> None:
    """Ends this home's head, and every process that it or a job of it started."""
    mark = ray_mark(Path(settings.home))
    _end("ray", settings, mark, wait_s)
    # What started while the others ended.
    end_processes(marked_processes(mark), wait_s)


def ensure_mlflow(settings: ServiceSettings) -> Ensured:
    """The living MLflow server of this home, on SQLite, artifacts in a folder beside it."""
    home = Path(settings.home)
    living = find_child("mlflow", home)
    if living is not None:
        return Ensured(living, started=False)
    before = recorded_child("mlflow", home)
    end_mlflow(settings)
    # The same port as before: running trials know the address.
    port = int(before.url.rsplit(":", 1)[1]) if before is not None else free_ports(1)[0]
    child = start_mlflow(home, port, settings.mlflow_login_file)
    return Ensured(child, started=True, replaced=before is not None)


def own_login(settings: ServiceSettings) -> None:
    """Makes the administrator's login of the local MLflow server if there is none yet."""
    file = Path(settings.mlflow_login_file)
    if not file.exists():
        # MLflow keeps the password of a user it knows: with a new one it begins anew
        _login_database(Path(settings.home)).unlink(missing_ok=True)
        write_private(file, f"admin:{secrets.token_urlsafe(32)}")


def _login_database(home: Path) -> Path:
    return home / "mlflow-logins.db"


def _with_login(home: Path, login_file: str) -> dict[str, str]:
    """The environment of a server that asks for a login."""
    user, password = login_in(Path(login_file))
    file = home / "mlflow-logins.ini"
    write_private(file, configuration_of(f"sqlite:///{_login_database(home)}", user))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": own_token(home / "mlflow-session-key"),
    }


def start_mlflow(home: Path, port: int, login_file: str = "") -> ChildRecord:
    """Starts an MLflow server on 127.0.0.1; it answers some seconds later.

    login_file: of the administrator's USER:PASSWORD; without it the server asks for no login.
    """
    # Settings of another tracking server, or of the service itself, must not reach this one.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "MASKRAY_"))
    }
    own = {
        # Each running trial writes at the same time; SQLAlchemy's default is 5 and 10.
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "40",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"),
        *("--artifacts-destination", str(home / "mlartifacts")),
    ]
    if login_file:
        own |= _with_login(home, login_file)
        command += ["--app-name", "basic-auth"]
    environment = marked({**clean, **own}, mlflow_mark(home))
    return start_child("mlflow", command, environment, home, url=f"http://127.0.0.1:{port}")


def end_mlflow(settings: ServiceSettings, wait_s: float = 5.0) -> None:
    """Ends this home's MLflow server with all that it started."""
    _end("mlflow", settings, mlflow_mark(Path(settings.home)), wait_s)


def _end(name: str, settings: ServiceSettings, mark: str, wait_s: float) -> None:
    # Listed before the parent ends: a process that has lost its parent is still found by its mark.
    children = marked_processes(mark)
    end_child(name, Path(settings.home), wait_s)
    end_processes([process for process in children if process.is_running()], wait_s)


def local_cpus(settings: ServiceSettings) -> int:
    """CPUs of the local head."""
    # Not cpu_count: this process may be pinned to fewer CPUs than the machine has.
    return settings.ray_cpus or len(os.sched_getaffinity(0))


def own_nodes(settings: ServiceSettings) -> list[Node]:
    """What the local head would hold; nothing where the service drives another cluster."""
    if settings.ray != "local":
        return []
    gpus = settings.ray_gpus if settings.ray_gpus >= 0 else _gpus_here()
    total = {"CPU": float(local_cpus(settings)), "GPU": float(gpus), **settings.ray_resources}
    return [Node("this machine", total, total)]


def _gpus_here() -> int:
    """How many GPUs Ray would find; the devices of NVIDIA's driver, less what is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([name for name in hidden.split(",") if name.strip() not in ("", "-1")])


def ray_mark(home: Path) -> str:
    return f"ray:{home}"


def mlflow_mark(home: Path) -> str:
    return f"mlflow:{home}"


def ray_token_file(settings: ServiceSettings) -> Path:
    """File of the local head's token."""
    named = settings.ray_token_file
    return Path(named) if named else Path(settings.home) / "ray-token"


class HangTimer:
    """Tells a head that is starting or busy from one that hangs."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def answered(self) -> None:
        self._since = time.monotonic()

    def over(self) -> bool:
        """Whether the head has not answered for too long."""
        return time.monotonic() - self._since > _HANGS_S
