"""What `maskray doctor` asks of each node, and what the node answers."""

from __future__ import annotations

from pydantic import BaseModel, Field

from contract.record import Record

PROBE_STORE, PROBE_REPORT = (
    "maskray-probe-store",
    "maskray-probe-report",
)  # each begins a line of the probe's output


class ProbePlan(Record):
    """For one of `nodes` probes. `store` is printed by the first one, as HOST:PORT."""

    index: int = Field(ge=0)
    nodes: int = Field(ge=1)
    address: str  # of this node in the cluster
    store: str = ""
    storage: str
    folder: str  # below `storage`, of this examination alone
    mlflow: str = ""
    patience_s: float = Field(60.0, gt=0)  # with the other nodes


class ClockReport(BaseModel):
    offset_s: float  # the first node's clock minus this one's
    uncertainty_s: float


class LinkReport(BaseModel):
    peer: int
    error: str = ""
    address: str = ""
    interface: str = ""
    mib_per_s: float = 0.0


class NodeReport(BaseModel):
    index: int
    host: str
    now: float
    versions: dict[str, str]
    sources: str  # hash of model, pipelines and workers as installed there
    gpu_driver: str
    disk_free_gib: float
    shm_free_gib: float
    mlflow_error: str
    meeting_error: str = ""
    storage_error: str = ""
    clock: ClockReport | None = None
    links: list[LinkReport] = []
