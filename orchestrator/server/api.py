"""The HTTP interface: every route under /v1, JSON in the records of `config`, errors as {"detail": one line}."""

from __future__ import annotations

import hashlib
import io
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from contract.answers import (
    ChangedStudy,
    Check,
    ClusterView,
    EventPage,
    Info,
    LogPage,
    QueueView,
    Staging,
    StudyView,
)
from contract.study import Submission
from orchestrator.cluster.jobs import UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import commands as steer
from orchestrator.ledger import queries
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.retention import apply_retention, plan_retention
from orchestrator.ledger.rows import StudyRow
from orchestrator.ledger.users import User
from orchestrator.schedule.decide import Wait
from orchestrator.server import accept, views
from orchestrator.server.logs import read_log
from orchestrator.settings import (
    ServiceSettings,
    code_files,
    code_name,
    service_files,
    storage_root,
)

_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_STUDY_ACTIONS: Mapping[str, Callable[[Transaction, str, str, float], bool]] = {
    "cancel": steer.cancel_study,
    "pause": steer.pause_study,
    "resume": steer.resume_study,
    "retry": steer.retry_study,
}
_TRIAL_ACTIONS = {"cancel": steer.cancel_trial, "retry": steer.retry_trial}
_MAX_SUBMISSION = 256 << 20
_MAX_REPORT = 256 << 20


class Hub(Protocol):
    """What the routes share with the loop."""

    ledger: Ledger
    settings: ServiceSettings

    def waits(self) -> Mapping[str, Wait]: ...
    def nodes(self) -> list[Node]: ...
    def cluster(self) -> ClusterView: ...
    def tracking_uri(self) -> str: ...
    def driver_log(self, submission_id: str) -> str: ...
    def examine(self) -> list[Check]: ...
    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging: ...
    def staging(self, name: str) -> Staging: ...
    def put_report(self, study: str, files: Mapping[str, bytes]) -> None: ...
    def touch(self) -> None: ...
    def wake(self) -> None: ...
    def end(self) -> None: ...


class Priority(BaseModel):
    priority: int = Field(ge=-100, le=100)


class Retention(BaseModel):
    checkpoints_days: float = Field(30.0, ge=0, le=36500)  # after the end of their study
    apply: bool = False


class StageRequest(BaseModel):
    uris: tuple[
        Annotated[str, Field(max_length=2000, pattern=r"^(s3|gs|gcs)://[^\x00]+$")], ...
    ] = Field(min_length=1, max_length=100)
    cache_gib: float = Field(20.0, ge=0.001, le=1e6)


class NewUser(BaseModel):
    role: Literal["read", "submit", "admin"]


StudyPath = Annotated[str, Field(max_length=100)]


def reader(request: Request) -> User:
    """The user whose token the request bears, whatever their role."""
    hub: Hub = request.app.state.hub
    with hub.ledger.reading() as transaction:
        found = auth.user_of(transaction, request.headers.get("authorization", ""))
    if found is None:
        raise HTTPException(
            401,
            "no valid token: set MASKRAY_TOKEN to yours (`maskray user NAME` gives one)",
            {"WWW-Authenticate": "Bearer"},
        )
    hub.touch()
    return found


def submitter(found: Annotated[User, Depends(reader)]) -> User:
    return _must(found, "submit")


def admin(found: Annotated[User, Depends(reader)]) -> User:
    return _must(found, "admin")


Reader: TypeAlias = Annotated[User, Depends(reader)]
Submitter: TypeAlias = Annotated[User, Depends(submitter)]
Admin: TypeAlias = Annotated[User, Depends(admin)]
READ, SUBMIT, ADMIN = ([Depends(who)] for who in (reader, submitter, admin))


def build_app(hub: Hub, version: str) -> FastAPI:
    app = FastAPI(
        title="maskray", version=version, description="Studies of Mask R-CNN on a Ray cluster."
    )
    app.state.hub = hub
    _add_errors(app)

    @app.get("/v1/health")
    def health() -> dict[str, Any]:
        return {"ok": True, "version": version}

    @app.get("/v1/info")
    def info(who: Reader) -> Info:
        uri = hub.settings.mlflow_public or hub.tracking_uri()
        root = storage_root(hub.settings)
        return Info(
            version=version,
            mlflow_uri=uri,
            storage=root,
            cluster=hub.cluster(),
            user=who.name,
            role=who.role,
        )

    # --- studies ---

    @app.post("/v1/studies")
    async def submit(request: Request, who: Submitter) -> dict[str, Any]:
        body = await _body(request, _MAX_SUBMISSION)
        return await run_in_threadpool(_submit, hub, body, who)

    @app.get("/v1/studies", dependencies=READ)
    def studies(trials: bool = True) -> dict[str, list[StudyView]]:
        """`trials=false` leaves them out and gives their counts by state alone, which stays quick with thousands."""
        with hub.ledger.reading() as transaction:
            return {"studies": views.study_views(transaction, hub.waits(), with_trials=trials)}

    @app.get("/v1/studies/{study}", dependencies=READ)
    def study(study: StudyPath) -> StudyView:
        return _view(hub, study)

    @app.get("/v1/studies/{study}/submission", dependencies=READ)
    def submission(study: StudyPath) -> Submission:
        with hub.ledger.reading() as transaction:
            found = views.submission_of(transaction, study)
        if found is None:
            raise HTTPException(404, f"study {study!r}: there is none")
        return found

    @app.post("/v1/studies/{study}/priority")
    def priority(study: StudyPath, body: Priority, who: Submitter) -> StudyView:
        with hub.ledger.writing() as transaction:
            _own_study(transaction, study, who)
            steer.set_priority(transaction, study, body.priority, who.name, time.time())
        hub.wake()
        return _view(hub, study)

    @app.post("/v1/studies/{study}/{action}")
    def act_on_study(
        study: StudyPath, action: Literal["cancel", "pause", "resume", "retry"], who: Submitter
    ) -> ChangedStudy:
        """The study after it, and whether there was anything to change."""
        with hub.ledger.writing() as transaction:
            _own_study(transaction, study, who)
            changed = _STUDY_ACTIONS[action](transaction, study, who.name, time.time())
        hub.wake()
        return ChangedStudy(**_view(hub, study).model_dump(), changed=changed)

    @app.delete("/v1/studies/{study}")
    def forget(study: StudyPath, who: Submitter) -> dict[str, Any]:
        with hub.ledger.writing() as transaction:
            _own_study(transaction, study, who)
            steer.forget_study(transaction, study, who.name, time.time())
        return {"study": study, "forgotten": True}

    @app.put("/v1/studies/{study}/report")
    async def report(study: StudyPath, request: Request, who: Submitter) -> dict[str, Any]:
        files = _report_files(await _body(request, _MAX_REPORT))
        return await run_in_threadpool(_keep_report, hub, study, files, who)

    # --- trials, queue, events ---

    @app.post("/v1/trials/{trial}/{action}")
    def act_on_trial(
        trial: StudyPath, action: Literal["cancel", "retry"], who: Submitter
    ) -> dict[str, Any]:
        with hub.ledger.writing() as transaction:
            row = queries.trial_row(transaction, trial)
            if row is None:
                raise HTTPException(404, f"trial {trial!r}: there is none")
            _own_study(transaction, row.study, who)
            changed = _TRIAL_ACTIONS[action](transaction, trial, who.name, time.time())
        hub.wake()
        return {"trial": trial, "action": action, "changed": changed}

    @app.get("/v1/trials/{trial}/logs", dependencies=READ)
    def logs(
        trial: StudyPath,
        attempt: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
        rank: Annotated[int, Query(ge=-1, le=100_000)] = 0,
        offset: Annotated[int, Query(ge=0, le=1 << 50)] = 0,
    ) -> LogPage:
        return read_log(hub.ledger, hub.driver_log, trial, attempt, rank, offset)

    @app.get("/v1/queue", dependencies=READ)
    def queue() -> QueueView:
        with hub.ledger.reading() as transaction:
            return QueueView.model_validate(views.queue(transaction, hub.waits()))

    @app.get("/v1/events", dependencies=READ)
    async def events(
        study: Annotated[str, Query(max_length=100)] = "",
        after: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
        wait_s: Annotated[float, Query(ge=0, le=60)] = 0,
    ) -> EventPage:
        import asyncio

        deadline = time.monotonic() + wait_s
        while True:
            found = await run_in_threadpool(_events, hub.ledger, after, study)
            if found or time.monotonic() >= deadline:
                return EventPage(events=found, next=found[-1].id if found else after)
            await asyncio.sleep(0.25)

    @app.get("/v1/finished", dependencies=READ)
    def finished(
        identity: Annotated[list[str], Query(max_length=1000)],
    ) -> dict[str, dict[str, str]]:
        with hub.ledger.reading() as transaction:
            found = queries.finished_by_identity(transaction, identity)
        return {"finished": {key: row.id for key, row in found.items()}}

    # --- code ---

    @app.head("/v1/code/{sha256}", dependencies=READ)
    def has_code(sha256: str) -> Response:
        return Response(
            status_code=200 if code_files(hub.settings).exists(code_name(_sha256(sha256))) else 404
        )

    @app.put("/v1/code/{sha256}", dependencies=SUBMIT)
    async def put_code(sha256: str, request: Request) -> dict[str, Any]:
        data = await _body(request, hub.settings.max_code_mib << 20)
        return await run_in_threadpool(_keep_code, hub.settings, _sha256(sha256), data)

    # --- administration ---

    @app.get("/v1/users", dependencies=ADMIN)
    def users() -> dict[str, Any]:
        with hub.ledger.reading() as transaction:
            return {"users": auth.users(transaction)}

    @app.put("/v1/users/{name}")
    def set_user(
        name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._@-]{0,79}$")],
        body: NewUser,
        who: Admin,
    ) -> dict[str, str]:
        if name == who.name:
            raise HTTPException(400, f"user {name}: is you; another administrator may change you")
        token = auth.new_token()
        with hub.ledger.writing() as transaction:
            auth.set_user(transaction, name, body.role, token, time.time())
        return {"user": name, "role": body.role, "token": token}

    @app.delete("/v1/users/{name}")
    def remove_user(name: str, who: Admin) -> dict[str, Any]:
        if name == who.name:
            raise HTTPException(400, f"user {name}: is you; another administrator may remove you")
        with hub.ledger.writing() as transaction:
            if not auth.remove_user(transaction, name):
                raise HTTPException(404, f"user {name!r}: there is none")
        return {"user": name, "removed": True}

    @app.post("/v1/gc", dependencies=ADMIN)
    def collect(body: Retention) -> dict[str, Any]:
        """What a retention policy lets go; with `apply` it goes."""
        now = time.time()
        with hub.ledger.reading() as transaction:
            removals = plan_retention(transaction, now, body.checkpoints_days)
        freed = (
            apply_retention(hub.ledger, removals, now, body.checkpoints_days) if body.apply else 0
        )
        return {
            "removals": [asdict(removal) for removal in removals],
            "applied": body.apply,
            "freed_bytes": freed,
        }

    @app.post("/v1/doctor", dependencies=SUBMIT)
    def examine() -> dict[str, list[Check]]:
        """Starts a short job on every node: the checks of `maskray doctor`."""
        return {"checks": hub.examine()}

    @app.post("/v1/staging", dependencies=SUBMIT)
    def stage(body: StageRequest) -> Staging:
        """Starts a job on every node that fetches datasets into its cache."""
        accept.check_uris(
            [(f"uris.{number}", uri) for number, uri in enumerate(body.uris)], hub.settings
        )
        return hub.stage(body.uris, body.cache_gib)

    @app.get("/v1/staging/{name}", dependencies=READ)
    def staging(name: Annotated[str, Path(pattern=r"^stage-[0-9a-f]{16}$")]) -> Staging:
        found = hub.staging(name)
        if not found.nodes:
            raise HTTPException(
                404,
                f"staging {name!r}: there is none, or Ray's head was restarted since: stage again",
            )
        return found

    @app.post("/v1/shutdown", dependencies=ADMIN)
    def shutdown() -> dict[str, Any]:
        hub.end()
        return {"ending": True}

    return app


# --- errors ---------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse(
            {"detail": views.in_words(error.detail)}, error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _explain(error.errors())}, 400)

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": views.in_words(error)}, 400)

    @app.exception_handler(UnreachableError)
    @app.exception_handler(OSError)  # of the storage
    async def unreachable(_: Request, error: UnreachableError | OSError) -> JSONResponse:
        return JSONResponse({"detail": views.in_words(error)}, 503)

    @app.middleware("http")
    async def no_nul(request: Request, call_next: Any) -> Response:
        # PostgreSQL holds no NUL character, and nothing of ours has one.
        if "\0" in request.url.path or "%00" in str(request.url):
            return JSONResponse({"detail": "the address holds a NUL character"}, 400)
        response: Response = await call_next(request)
        return response


def _explain(problems: Any) -> str:
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {views.in_words(first['msg'])}"


def _must(found: User, role: auth.Role) -> User:
    if not found.may(role):
        raise HTTPException(403, f"user {found.name} has role {found.role!r}; this needs {role!r}")
    return found


def _own_study(transaction: Transaction, study: str, who: User) -> StudyRow:
    row = queries.study_row(transaction, study)
    if row is None:
        raise HTTPException(404, f"study {study!r}: there is none")
    if row.owner != who.name and not who.may("admin"):
        raise HTTPException(
            403,
            f"study {study} is {row.owner}'s: only its owner or an administrator may do this",
        )
    return row


def _sha256(text: str) -> str:
    if not _SHA256.match(text):
        raise HTTPException(
            400, "code: the name is the SHA-256 of the package, 64 hexadecimal digits"
        )
    return text


# --- work behind a route --------------------------------------------------------------------------------------------


async def _body(request: Request, limit: int) -> bytes:
    """The request's bytes, refused while they arrive if there are too many."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the request is larger than {limit >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def _submit(hub: Hub, body: bytes, who: User) -> dict[str, Any]:
    try:
        submission = Submission.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, _explain(error.errors(include_url=False))) from None
    _refuse_what_sql_cannot_hold(submission)
    accept.check(submission, hub.settings, hub.nodes())
    study, created = accept.accept(hub.ledger, hub.settings, submission, who.name, time.time())
    hub.wake()
    return {"study": study, "created": created, "trials": len(submission.trials)}


def _refuse_what_sql_cannot_hold(submission: Submission) -> None:
    if not all(math.isfinite(value) for trial in submission.trials for value in _floats(trial.run)):
        raise HTTPException(400, "submission: a number is not finite")
    if "\\u0000" in submission.model_dump_json():
        raise HTTPException(400, "submission: a text holds a NUL character")
    for trial in submission.trials:
        if not -(2**31) <= trial.seed < 2**31:
            raise HTTPException(
                400, f"trial {trial.key}: its seed {trial.seed} is larger than 2147483647"
            )


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _view(hub: Hub, study: str) -> StudyView:
    with hub.ledger.reading() as transaction:
        found = views.study_views(transaction, hub.waits(), study)
    if not found:
        raise HTTPException(404, f"study {study!r}: there is none")
    return found[0]


def _events(ledger: Ledger, after: int, study: str) -> list[Any]:
    with ledger.reading() as transaction:
        return views.events(transaction, after, study)


def _keep_code(settings: ServiceSettings, sha256: str, data: bytes) -> dict[str, Any]:
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise HTTPException(
            400,
            f"code: sha256 of the bytes is {actual[:12]}..., not {sha256[:12]}...; send it again",
        )
    total = 0
    for entry in _entries(data, "code"):
        total += entry.file_size
        if total > 4 * settings.max_code_mib << 20:
            raise HTTPException(413, f"code: unpacks to more than {4 * settings.max_code_mib} MiB")
    code_files(settings).write(code_name(sha256), data)
    return {"code": sha256, "bytes": len(data)}


def _entries(data: bytes, what: str) -> list[zipfile.ZipInfo]:
    """The files of a zip whose every name stays inside the folder it is unpacked into."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise HTTPException(400, f"{what}: is no zip ({error})") from None
    for entry in entries:
        path = PurePosixPath(entry.filename)
        link = (entry.external_attr >> 16) & 0o170000 == 0o120000
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.filename
            or re.match("[A-Za-z]:", entry.filename)
            or link
        ):
            raise HTTPException(400, f"{what}: {entry.filename!r} leaves the package")
    return entries


def _report_files(data: bytes) -> dict[str, bytes]:
    entries = [entry for entry in _entries(data, "report") if not entry.is_dir()]
    if sum(entry.file_size for entry in entries) > _MAX_REPORT or len(entries) > 2000:
        raise HTTPException(413, "report: unpacks to too much")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise HTTPException(400, f"report: cannot be unpacked ({error})") from None


def _keep_report(hub: Hub, study: str, files: Mapping[str, bytes], who: User) -> dict[str, Any]:
    with hub.ledger.reading() as transaction:
        row = _own_study(transaction, study, who)
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name in files:
        if (
            name in folders
            or not PurePosixPath(name).name
            or any(len(part) > 200 for part in PurePosixPath(name).parts)
        ):
            raise HTTPException(400, f"report: {name[:200]!r} is no name of a file; pack it again")
    for name, data in files.items():
        service_files(row.storage).write(f"{study}/report/{name}", data)
    hub.put_report(study, files)
    return {"study": study, "files": len(files)}
