"""What the routes share with the loop: the service's other threads, seen from a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from contract.answers import Check, ClusterView, Staging
from orchestrator.cluster.nodes import Node
from orchestrator.ledger.opening import Ledger
from orchestrator.schedule.decide import Wait
from orchestrator.schedule.measures import Measures
from orchestrator.settings import ServiceSettings


class Hub(Protocol):
    """A service's ledger, settings, loop, cluster and books."""

    ledger: Ledger
    settings: ServiceSettings

    def waits(self) -> Mapping[str, Wait]:
        """Why each queued trial waits, by its id, and what MLflow lacks of those that are over."""

    def nodes(self) -> list[Node]:
        """The nodes that a study may count on; empty while they are not known."""

    def cluster(self) -> ClusterView: ...

    def tracking_uri(self) -> str:
        """The MLflow server's URI; empty without one, and while a local one starts."""

    def experiment_id(self, name: str) -> str:
        """MLflow's id of a study's experiment; empty until the books have asked the server."""

    def driver_log(self, submission_id: str) -> str:
        """What Ray has of the output of a driver that still runs."""

    def examine(self) -> list[Check]: ...

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging: ...

    def staging(self, name: str) -> Staging: ...

    def measures(self) -> Measures:
        """What the service measures of itself."""

    def touch(self) -> None:
        """Notes that a client is there: an idle service ends itself."""

    def wake(self) -> None:
        """Starts the loop's next turn now: a request changed something."""

    def end(self) -> None: ...
