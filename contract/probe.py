"""The doctor's question to each node, and the node's answer."""

from __future__ import annotations

from pydantic import BaseModel, Field

from contract.record import Record

# Each begins a line of the probe's output. The rest of the line is the store's address, or a
# NodeReport as JSON; the log holds lines of others too.
PROBE_STORE, PROBE_REPORT = "maskray-probe-store", "maskray-probe-report"


class ProbePlan(Record):
    """The plan of one of `nodes` probes. The first probe opens the store and prints its address."""

    index: int = Field(ge=0)
    nodes: int = Field(ge=1)
    address: str  # of this node in the cluster
    store: str = ""  # HOST:PORT; empty for the first probe
    storage: str
    folder: str  # below `storage`, of this examination alone
    mlflow: str = ""
    patience_s: float = Field(60.0, gt=0)  # how long a probe waits for the others


class ClockReport(BaseModel):
    offset_s: float  # the first node's clock minus this one's
    uncertainty_s: float


class LinkReport(BaseModel):
    peer: int  # index of the other probe
    error: str = ""  # empty where the pair could add up numbers; the rest is set then
    address: str = ""
    interface: str = ""
    mib_per_s: float = 0.0


class NodeReport(BaseModel):
    """A probe fills it in step by step, so it is not frozen. An empty error is none."""

    index: int
    host: str
    now: float  # Unix time
    versions: dict[str, str]  # of Python and of packages, by name
    sources: str  # hash of contract, model, pipelines and workers as installed there
    gpu_driver: str  # "NVIDIA 550.1, 8 devices", why that is not known, or empty without GPUs
    disk_free_gib: float
    shm_free_gib: float
    mlflow_error: str
    meeting_error: str = ""
    storage_error: str = ""
    clock: ClockReport | None = None
    links: list[LinkReport] = []
