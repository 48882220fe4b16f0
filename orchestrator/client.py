"""The service from the outside: one typed method per route."""

from __future__ import annotations

import io
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from contract.answers import (
    Accepted,
    ChangedStudy,
    ChangedTrial,
    Check,
    Checks,
    CodeKept,
    Collected,
    Ending,
    EventPage,
    Finished,
    Forgotten,
    Health,
    Info,
    LogPage,
    NewToken,
    PageLink,
    QueueView,
    Refusal,
    Staging,
    StudyAction,
    StudyList,
    StudyView,
    Submitted,
    TrialAction,
    UserList,
    UserRemoved,
    UserView,
)
from contract.machine.certificates import trusted
from contract.machine.proxies import proxy_for, way_to
from contract.study import Submission

_TRIES = 4  # a service that restarts listens again within 0.3 + 0.6 + 1.2 s
_IDENTITIES_A_REQUEST = 100  # of 64 characters each: the URL stays below 8 KiB
_LONG_S = 300.0  # for an upload
_PROXY_WANTS_PASSWORD = 407  # of the statuses, the one that no service of ours gives

AnyAnswer = TypeVar("AnyAnswer", bound=BaseModel)
_Fields: TypeAlias = Mapping[str, str | float | Sequence[str]]


@dataclass(frozen=True)
class Connection:
    """Where a service listens, and the token to show it.

    root: the folder that the service belongs to; None for a service that is configured by its URL.
    """

    url: str
    token: str
    root: Path | None = None


def configured(environment: Mapping[str, str]) -> Connection | None:
    """The service that MASKRAY_SERVER and MASKRAY_TOKEN name; None without them."""
    url = environment.get("MASKRAY_SERVER", "")
    if not url:
        return None
    token = environment.get("MASKRAY_TOKEN", "").strip()
    if not token:
        raise ValueError(
            f"MASKRAY_SERVER is {url}, but MASKRAY_TOKEN is empty: set it to your token"
        )
    # The HTTP library refuses such a header with a message that shows the token.
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            "MASKRAY_TOKEN: holds characters that no token has; "
            "set it to the one line that you were given"
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"MASKRAY_SERVER: {url!r} is no URL; write http://HOST:PORT")
    return Connection(url.rstrip("/"), token)


class _Options(TypedDict, total=False):
    """What a request may carry, as httpx names it."""

    params: _Fields
    json: _Fields
    content: bytes
    headers: Mapping[str, str]
    timeout: float


class Client:
    """Raises ValueError if the service refuses a request, RuntimeError if it does not answer."""

    def __init__(self, connection: Connection, timeout_s: float = 60.0) -> None:
        self.connection = connection
        headers = {"Authorization": f"Bearer {connection.token}"}
        # The service of a folder runs on this machine, by whatever address it listens.
        own = connection.root is not None
        self._way = "" if own else way_to(connection.url)
        self._http = httpx.Client(
            base_url=connection.url,
            headers=headers,
            timeout=timeout_s,
            proxy=None if own else proxy_for(connection.url),
            verify=trusted(),
            trust_env=False,  # no .netrc comes in between, and the proxy is our choice
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def where(self) -> str:
        """Whose service this is: that of a folder, or the one at an address."""
        root = self.connection.root
        return f"at {self.connection.url}" if root is None else f"in {root}"

    def health(self) -> Health:
        return self._call(Health, "GET", "/v1/health")

    def info(self) -> Info:
        """Who asks, and what the service drives."""
        return self._call(Info, "GET", "/v1/info")

    def submit(self, submission: Submission) -> Submitted:
        """Sends a study. The same idempotency key sent twice is one study."""
        body = submission.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        return self._call(Submitted, "POST", "/v1/studies", content=body, headers=headers)

    def check(self, submission: Submission) -> Accepted:
        """Raises ValueError for what `submit` would be refused for; keeps nothing."""
        body = submission.model_dump_json().encode()
        headers = {"Content-Type": "application/json"}
        path = "/v1/studies/check"
        return self._call(Accepted, "POST", path, content=body, headers=headers)

    def studies(self, trials: bool = True) -> list[StudyView]:
        """All studies; without `trials` only with their counts by state."""
        return self._call(StudyList, "GET", "/v1/studies", params={"trials": trials}).studies

    def study(self, study: str) -> StudyView:
        return self._call(StudyView, "GET", f"/v1/studies/{study}")

    def page_link(self, study: str) -> str:
        """The address of the study's page for a browser; it holds for some days."""
        answer = self._call(PageLink, "GET", f"/v1/studies/{study}/link")
        return f"{self.connection.url.rstrip('/')}{answer.path}"

    def submission(self, study: str) -> Submission:
        """A study with its trials as it was submitted."""
        return self._call(Submission, "GET", f"/v1/studies/{study}/submission")

    def events(self, study: str = "", after: int = 0, wait_s: float = 0.0) -> EventPage:
        """Events after the id `after`; without any the service waits for one up to `wait_s`."""
        return self._call(
            EventPage,
            "GET",
            "/v1/events",
            params={"study": study, "after": after, "wait_s": wait_s},
            timeout=wait_s + 30,  # the service answers late on purpose
        )

    def act_on_study(self, study: str, action: StudyAction) -> ChangedStudy:
        """The study after the action."""
        return self._call(ChangedStudy, "POST", f"/v1/studies/{study}/{action}")

    def act_on_trial(self, trial: str, action: TrialAction) -> ChangedTrial:
        return self._call(ChangedTrial, "POST", f"/v1/trials/{trial}/{action}")

    def set_priority(self, study: str, priority: int) -> StudyView:
        path = f"/v1/studies/{study}/priority"
        return self._call(StudyView, "POST", path, json={"priority": priority})

    def keeps(self, study: str) -> Forgotten:
        """What `forget` would keep; it forgets nothing."""
        return self._call(Forgotten, "GET", f"/v1/studies/{study}/keeps")

    def forget(self, study: str, files: bool = False) -> Forgotten:
        """Removes a study that is over from the ledger; with `files` its folder, too."""
        path = f"/v1/studies/{study}"
        return self._call(Forgotten, "DELETE", path, params={"files": files}, timeout=600.0)

    def queue(self) -> QueueView:
        """What runs, and what waits in the order in which it would start."""
        return self._call(QueueView, "GET", "/v1/queue")

    def logs(self, trial: str, attempt: int = 0, rank: int = 0, offset: int = 0) -> LogPage:
        """A part of a rank's log from `offset` bytes on.

        attempt: 0 is the newest. rank: -1 is the driver, which starts the ranks.
        """
        params = {"attempt": attempt, "rank": rank, "offset": offset}
        return self._call(LogPage, "GET", f"/v1/trials/{trial}/logs", params=params)

    def has_code(self, sha256: str) -> bool:
        return self._send("HEAD", f"/v1/code/{sha256}").status_code == 200

    def upload_code(self, sha256: str, data: bytes) -> None:
        """Sends a package unless the service has it; the service knows packages by their hash."""
        if not self.has_code(sha256):
            self._call(CodeKept, "PUT", f"/v1/code/{sha256}", content=data, timeout=_LONG_S)

    def finished(self, identities: Sequence[str]) -> dict[str, str]:
        """Identity -> the trial that has its result, for the identities that have one."""
        trials: dict[str, str] = {}
        for start in range(0, len(identities), _IDENTITIES_A_REQUEST):
            part = list(identities[start : start + _IDENTITIES_A_REQUEST])
            answer = self._call(Finished, "GET", "/v1/finished", params={"identity": part})
            trials |= answer.finished
        return trials

    def manifest(self, uri: str) -> bytes:
        """The manifest of a dataset that the service can read."""
        return self._bytes("/v1/manifests", {"uri": uri})

    def report(self, study: str) -> dict[str, bytes]:
        """The files of a study's report, which the service makes."""
        packed = self._bytes(f"/v1/studies/{study}/report", {})
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def report_form(self, study: str, form: str) -> bytes:
        """One form of the report alone."""
        return self._bytes(f"/v1/studies/{study}/report", {"form": form})

    def _bytes(self, path: str, params: _Fields) -> bytes:
        response = self._send("GET", path, params=params, timeout=_LONG_S)
        if response.status_code != 200:
            raise self._refusal(response)
        return response.content

    def users(self) -> list[UserView]:
        return self._call(UserList, "GET", "/v1/users").users

    def set_user(self, name: str, role: str) -> NewToken:
        """Gives a user a role and a new token, which the service shows this once."""
        return self._call(NewToken, "PUT", f"/v1/users/{name}", json={"role": role})

    def remove_user(self, name: str) -> UserRemoved:
        return self._call(UserRemoved, "DELETE", f"/v1/users/{name}")

    def collect_garbage(self, checkpoints_days: float, apply: bool = False) -> Collected:
        """Removes the checkpoints of studies that ended long ago; without `apply` it lists them."""
        body = {"checkpoints_days": checkpoints_days, "apply": apply}
        return self._call(Collected, "POST", "/v1/gc", json=body, timeout=600.0)

    def collect_forgotten(self, apply: bool = False) -> Collected:
        """Removes the folders that forgotten studies left; without `apply` it lists them."""
        return self._call(
            Collected, "POST", "/v1/gc/forgotten", params={"apply": apply}, timeout=600.0
        )

    def examine(self) -> list[Check]:
        """What `maskray doctor` prints; lasts as long as the slowest node starts a process."""
        return self._call(Checks, "POST", "/v1/doctor", timeout=600.0).checks

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        """Starts to fill every node's cache with remote datasets."""
        body: _Fields = {"uris": list(uris), "cache_gib": cache_gib}
        return self._call(Staging, "POST", "/v1/staging", json=body, timeout=150.0)

    def staging(self, name: str) -> Staging:
        """How far a staging is, by its id."""
        return self._call(Staging, "GET", f"/v1/staging/{name}")

    def shut_down(self) -> Ending:
        """Asks the service to end; it answers before it does."""
        return self._call(Ending, "POST", "/v1/shutdown")

    def _call(
        self, answer: type[AnyAnswer], method: str, path: str, **options: Unpack[_Options]
    ) -> AnyAnswer:
        response = self._send(method, path, **options)
        if response.status_code == 200:
            return answer.model_validate_json(response.content)
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> ValueError | RuntimeError:
        detail = _detail(response)
        if response.status_code < 500 and response.status_code != _PROXY_WANTS_PASSWORD:
            return ValueError(detail)
        return RuntimeError(f"service {self.connection.url}{self._way}: {detail}")

    def _send(self, method: str, path: str, **options: Unpack[_Options]) -> httpx.Response:
        for attempt in range(_TRIES):
            try:
                return self._http.request(method, path, **options)
            except httpx.ConnectError as error:
                # Nothing was sent, so a second try is safe. After any other error the service may
                # have done what was asked, and only the caller knows whether twice is once.
                if attempt == _TRIES - 1:
                    raise RuntimeError(
                        f"service {self.connection.url}{self._way} does not answer ({error}); "
                        "is it running?"
                    ) from error
                time.sleep(0.3 * 2**attempt)
            except httpx.HTTPError as error:
                raise RuntimeError(
                    f"service {self.connection.url}{self._way}: {error or type(error).__name__}"
                ) from error
        raise AssertionError


def _detail(response: httpx.Response) -> str:
    """Why the service refuses."""
    try:
        return Refusal.model_validate_json(response.content).detail
    except ValueError:  # a proxy in between answers in words of its own
        return f"status {response.status_code}"
