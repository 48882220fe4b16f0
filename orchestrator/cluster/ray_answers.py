"""What Ray's dashboard answers, as far as the orchestrator reads it.

Ray documents the Jobs API alone; the rest is as Ray 2.60 answers. Unknown fields are ignored, so
a newer Ray that only adds some is read as well. A missing field is an error of the answer.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeAlias, TypeVar

from pydantic import AliasPath, BaseModel, Field, RootModel

JobState: TypeAlias = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
Amounts: TypeAlias = dict[str, float]  # of resources, by name: {"CPU": 8.0, "GPU": 4.0}

Row = TypeVar("Row", bound=BaseModel)


class Version(BaseModel):
    """/api/version"""

    ray_version: str
    session_name: str


# --- the state API: /api/v0/nodes, /api/v0/placement_groups, /api/v0/actors -----------------------


class State(BaseModel, Generic[Row]):
    rows: list[Row] = Field(validation_alias=AliasPath("data", "result", "result"))


class NodeAddress(BaseModel):
    node_id: str
    node_ip: str
    is_head_node: bool


class NodeTotal(BaseModel):
    node_id: str
    resources_total: Amounts


class Bundle(BaseModel):
    node_id: str | None
    unit_resources: Amounts


class PlacementGroup(BaseModel):
    bundles: list[Bundle]


class Actor(BaseModel):
    node_id: str | None
    placement_group_id: str | None
    required_resources: Amounts | None


# --- /api/cluster_status --------------------------------------------------------------------------


class _LoadMetrics(BaseModel):
    usage_by_node: dict[str, dict[str, tuple[float, float]]] | None = Field(
        None, alias="usageByNode"
    )  # used and total of each resource


class _Status(BaseModel):
    load_metrics: _LoadMetrics = Field(alias="loadMetricsReport")


class ClusterStatus(BaseModel):
    status: _Status | None = Field(validation_alias=AliasPath("data", "clusterStatus"))


# --- the Jobs API: /api/jobs ----------------------------------------------------------------------


class JobDetails(BaseModel):
    """One of /api/jobs. Without a submission id it is a driver that nobody submitted."""

    submission_id: str | None = None
    status: JobState
    message: str | None = None
    driver_exit_code: int | None = None
    driver_node_id: str | None = None
    metadata: dict[str, str] | None = None


class JobList(RootModel[list[JobDetails]]):
    """/api/jobs/"""


class JobLogs(BaseModel):
    logs: str | None


class RuntimeEnvironment(BaseModel):
    env_vars: dict[str, str]
    working_dir: str | None = None


class JobRequest(BaseModel):
    entrypoint: str
    submission_id: str
    runtime_env: RuntimeEnvironment
    metadata: dict[str, str]
    entrypoint_label_selector: dict[str, str] | None = None
