"""The service from the outside: one typed method per route."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from contract.answers import (
    ActedView,
    Check,
    EventPage,
    Info,
    LogPage,
    QueueView,
    Staging,
    StudyView,
)
from contract.study import Submission


@dataclass(frozen=True)
class Connection:
    """Where a service listens, and the token to show it. `root` is None for one that is not this folder's own."""

    url: str
    token: str
    root: Path | None = None


class Client:
    """Raises ValueError for what the service refuses, RuntimeError for a service that does not answer."""

    def __init__(self, connection: Connection, timeout_s: float = 60.0) -> None:
        self.connection = connection
        headers = {"Authorization": f"Bearer {connection.token}"}
        self._http = httpx.Client(
            base_url=connection.url, headers=headers, timeout=timeout_s, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def health(self) -> dict[str, Any]:
        return dict(self._call("GET", "/v1/health"))

    def info(self) -> Info:
        return Info.model_validate(self._call("GET", "/v1/info"))

    def submit(self, submission: Submission) -> dict[str, Any]:
        """{"study": id, "created": whether it is new, "trials": how many}"""
        body = submission.model_dump_json().encode()
        return dict(
            self._call(
                "POST", "/v1/studies", content=body, headers={"Content-Type": "application/json"}
            )
        )

    def studies(self, trials: bool = True) -> list[StudyView]:
        """All studies; without `trials` only with their counts by state."""
        found = self._call("GET", "/v1/studies", params={"trials": trials})["studies"]
        return [StudyView.model_validate(view) for view in found]

    def study(self, study: str) -> StudyView:
        return StudyView.model_validate(self._call("GET", f"/v1/studies/{study}"))

    def submission(self, study: str) -> Submission:
        return Submission.model_validate(self._call("GET", f"/v1/studies/{study}/submission"))

    def events(self, study: str = "", after: int = 0, wait_s: float = 0.0) -> EventPage:
        params: Mapping[str, str | float] = {"study": study, "after": after, "wait_s": wait_s}
        return EventPage.model_validate(
            self._call("GET", "/v1/events", params=params, timeout=wait_s + 30)
        )

    def act_on_study(self, study: str, action: str) -> ActedView:
        """`action`: cancel, pause, resume or retry."""
        return ActedView.model_validate(self._call("POST", f"/v1/studies/{study}/{action}"))

    def act_on_trial(self, trial: str, action: str) -> bool:
        """`action`: cancel or retry. Whether there was anything to change."""
        return bool(self._call("POST", f"/v1/trials/{trial}/{action}")["changed"])

    def set_priority(self, study: str, priority: int) -> None:
        self._call("POST", f"/v1/studies/{study}/priority", json={"priority": priority})

    def forget(self, study: str) -> None:
        self._call("DELETE", f"/v1/studies/{study}")

    def queue(self) -> QueueView:
        return QueueView.model_validate(self._call("GET", "/v1/queue"))

    def logs(self, trial: str, attempt: int = 0, rank: int = 0, offset: int = 0) -> LogPage:
        """A part of a rank's log from `offset` bytes on; attempt 0 is the newest, rank -1 the driver."""
        params: Mapping[str, int] = {"attempt": attempt, "rank": rank, "offset": offset}
        return LogPage.model_validate(self._call("GET", f"/v1/trials/{trial}/logs", params=params))

    def has_code(self, sha256: str) -> bool:
        return self._send("HEAD", f"/v1/code/{sha256}").status_code == 200

    def upload_code(self, sha256: str, data: bytes) -> None:
        """Sends a package once; the service knows it by its hash from then on."""
        if not self.has_code(sha256):
            self._call("PUT", f"/v1/code/{sha256}", content=data, timeout=300.0)

    def finished(self, identities: Sequence[str]) -> dict[str, str]:
        """Identity -> the trial that has its result, for those that have one."""
        found: dict[str, str] = {}
        for start in range(0, len(identities), 100):
            part = list(identities[start : start + 100])
            found |= self._call("GET", "/v1/finished", params={"identity": part})["finished"]
        return found

    def upload_report(self, study: str, folder: Path) -> None:
        """Keeps the files of a report with the study, and as artifacts of its MLflow run."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(folder).as_posix())
        self._call("PUT", f"/v1/studies/{study}/report", content=packed.getvalue(), timeout=300.0)

    def users(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v1/users")["users"])

    def set_user(self, name: str, role: str) -> str:
        """The new token of a user, shown this once."""
        return str(self._call("PUT", f"/v1/users/{name}", json={"role": role})["token"])

    def remove_user(self, name: str) -> None:
        self._call("DELETE", f"/v1/users/{name}")

    def collect_garbage(self, checkpoints_days: float, apply: bool = False) -> dict[str, Any]:
        """{"removals": [{"study", "trial", "folder", "bytes"}], "applied", "freed_bytes"}; only told unless `apply`."""
        body = {"checkpoints_days": checkpoints_days, "apply": apply}
        return dict(self._call("POST", "/v1/gc", json=body, timeout=600.0))

    def examine(self) -> list[Check]:
        """What `maskray doctor` prints; takes as long as the slowest node needs to start a process."""
        return [
            Check.model_validate(check)
            for check in self._call("POST", "/v1/doctor", timeout=600.0)["checks"]
        ]

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        """Starts filling every node's cache with remote datasets."""
        body = {"uris": list(uris), "cache_gib": cache_gib}
        return Staging.model_validate(self._call("POST", "/v1/staging", json=body, timeout=150.0))

    def staging(self, name: str) -> Staging:
        return Staging.model_validate(self._call("GET", f"/v1/staging/{name}"))

    def shut_down(self) -> None:
        self._call("POST", "/v1/shutdown")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        response = self._send(method, path, **options)
        if response.status_code == 200:
            return response.json()
        try:
            detail = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"status {response.status_code}"
        if response.status_code < 500:
            raise ValueError(detail)
        raise RuntimeError(f"service {self.connection.url}: {detail}")

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        for attempt in range(4):
            try:
                return self._http.request(method, path, **options)
            except httpx.ConnectError as error:
                if attempt == 3:
                    raise RuntimeError(
                        f"service {self.connection.url} does not answer ({error}); is it running?"
                    ) from error
                time.sleep(0.3 * 2**attempt)  # a service that is being restarted listens again soon
            except httpx.HTTPError as error:
                raise RuntimeError(
                    f"service {self.connection.url}: {error or type(error).__name__}"
                ) from error
        raise AssertionError
