"""How one service is set up: where it listens, where it keeps its state, and what it drives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from contract.files import Files, uri_join
from contract.record import Record
from contract.yaml import parse_yaml


def has_credentials(uri: str) -> bool:
    """Whether a URI has the form `scheme://USER:PASSWORD@host`."""
    return "@" in uri.partition("://")[2].partition("/")[0]


class Limits(Record):
    """What admission never exceeds; 0 is no limit."""

    running: int = Field(0, ge=0)  # trials at once over all users
    running_per_user: int = Field(0, ge=0)
    # A waiting trial gains one point of priority in this time.
    ageing_s: float = Field(3600.0, gt=0)
    # Before the second try of a failed attempt; doubled for each further try.
    backoff_s: float = Field(30.0, ge=0)
    # An attempt whose step stands still for so long is started again.
    stall_s: float = Field(1800.0, gt=0)
    # Nodes lost in a row without a step gained, before a trial is given up.
    lost_without_progress: int = Field(5, ge=1)


class Keep(Record):
    """After how many days the service deletes by itself what is of no use; 0 is never."""

    checkpoints_days: float = Field(0.0, ge=0, le=36500)  # since the end of their study
    # since a package of sources came, if no study of the ledger has it
    code_days: float = Field(0.0, ge=0, le=36500)
    # since a study was forgotten whose folder stayed
    forgotten_days: float = Field(0.0, ge=0, le=36500)
    # since the end of their study: MLflow's copies of best weights that trials' folders have
    copies_days: float = Field(0.0, ge=0, le=36500)


class NodeShape(Record):
    """Nodes that a growing cluster can have: what one of them holds, and how many there may be."""

    resources: dict[str, float] = Field(min_length=1)  # as Ray counts them: {"CPU": 96, "GPU": 8}
    count: int = Field(1, ge=1)


class ServiceSettings(Record):
    """One service: where it listens, where it keeps its state, and what it drives."""

    host: str = "127.0.0.1"
    port: int = Field(8750, ge=0, le=65535)  # 0 takes a free one
    # Folder of the service's own files: token, logs, local Ray head and MLflow.
    home: str = Field(min_length=1)
    # PEM files: with them the service speaks TLS itself, without them HTTP
    tls_certificate: str = ""
    tls_key: str = ""
    ledger: str = ""  # SQLAlchemy URL; empty is SQLite under `home`
    ledger_file: str = ""  # the file that holds that URL, which holds a password
    storage: str = ""  # folder or pyarrow.fs URI for trial folders; empty is `home`/studies
    ray: str = "local"  # URL of a Ray dashboard, or "local" for a head of its own
    ray_token_file: str = ""  # of a cluster that is not "local"; without it RAY_AUTH_TOKEN counts
    # The cluster grows on request: the service asks for what the head of the queue lacks.
    autoscale: bool = False
    # What the cluster can grow to. Without shapes the service refuses no study for its size.
    node_shapes: tuple[NodeShape, ...] = ()
    ray_cpus: int = Field(0, ge=0)  # of the local head; 0 is what the machine has
    ray_gpus: int = Field(-1, ge=-1)  # of the local head; -1 lets Ray look
    # Object store of the local head. It is small, as trials pass next to nothing through it.
    ray_memory_mib: int = Field(256, ge=80)
    ray_resources: dict[str, float] = {}  # custom resources of the local head
    mlflow: str = "local"  # URI of a tracking server, "local" for one of its own, empty for none
    mlflow_public: str = ""  # the same server as a person's browser opens it
    # The file of an MLflow administrator's USER:PASSWORD: each study then gets a login of its own.
    # With "local" it is made with mode 0600 if absent, and the server asks for a login.
    mlflow_login_file: str = ""
    # A study starts without its parent run after this long.
    mlflow_wait_s: float = Field(90.0, ge=0)
    # The first administrator's token, made with mode 0600 if absent; empty is `home`/token.
    token_file: str = ""
    # The service ends itself after this long with nothing to do and no client; 0 is never.
    idle_minutes: float = Field(0.0, ge=0)
    roots: tuple[str, ...] = ()  # folders and URIs that studies may name; empty allows every path
    entry: tuple[str, ...] = ("python", "-m", "workers.ray_entry")  # `--spec FILE` is appended
    environment: dict[str, str] = {}  # of every trial's processes
    grace_s: float = Field(60.0, gt=0)  # from asking a trial to stop to ending it by force
    poll_s: float = Field(1.0, gt=0)  # between two turns of the loop
    max_code_mib: int = Field(64, ge=1)
    webhook: str = ""  # receives a JSON POST when a study ends
    limits: Limits = Limits()
    keep: Keep = Keep()

    @model_validator(mode="after")
    def _both_of_tls(self) -> ServiceSettings:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key: give both or none")
        return self

    @field_validator("storage", "mlflow", "mlflow_public", "roots")
    @classmethod
    def _without_credentials(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for uri in (value,) if isinstance(value, str) else value:
            if has_credentials(uri):
                raise ValueError(
                    "holds credentials, and every user may read it; use the environment "
                    "(AWS_..., MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
                )
        return value


def without_secrets(settings: ServiceSettings) -> ServiceSettings:
    """As a person may see it: without the ledger's password, the webhook's path, variables."""
    ledger = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", settings.ledger)
    ledger = re.sub(r"(?i)(password=)[^&]*", r"\1***", ledger)
    webhook = re.sub(r"(://(?:.*@)?([^/?]*)).*", r"://\2/***", settings.webhook)
    return settings.model_copy(
        update={
            "ledger": ledger,
            "webhook": webhook,
            "environment": dict.fromkeys(settings.environment, "***"),
        }
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name; not validated, since options may still replace some.

    Raises ValueError, one line, if the file is not plain YAML that holds settings by name.
    """
    text = path.read_text("utf-8")
    lines = (line.strip() for line in text.splitlines())
    # `parse_yaml` refuses an empty document, but a file with every setting commented out is sound.
    if all(not line or line.startswith("#") for line in lines):
        return {}
    return parse_yaml(text, str(path))


def ledger_url(settings: ServiceSettings) -> str:
    """The SQLAlchemy URL of the ledger, which may hold a password. Raises OSError."""
    if settings.ledger and settings.ledger_file:
        raise ValueError("ledger and ledger_file: give one of them")
    if settings.ledger_file:
        return Path(settings.ledger_file).read_text("utf-8").strip()
    return settings.ledger or f"sqlite:///{Path(settings.home) / 'ledger.db'}"


def storage_root(settings: ServiceSettings) -> str:
    """Folder or URI under which each study has its folder."""
    return settings.storage or str(Path(settings.home) / "studies")


def service_files(folder: str) -> Files:
    """The files of `folder` as the service reads them.

    One try: the loop's next turn is the next one, and nothing else may wait for a dead store.
    """
    return Files(folder, tries=1)


def code_files(settings: ServiceSettings) -> Files:
    """The zips of sources, each named by `code_name`."""
    return service_files(uri_join(storage_root(settings), ".code"))


def code_name(sha256: str) -> str:
    """The file of a package among `code_files`."""
    return f"{sha256}.zip"
