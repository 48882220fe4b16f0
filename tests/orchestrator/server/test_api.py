"""The HTTP interface without a cluster: who may do what, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import math
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract.answers import Check, ClusterView, Role, StagedNode, Staging
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import attempts, changes
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger
from orchestrator.schedule.measures import Measures
from orchestrator.server.api import build_app
from orchestrator.server.front import failures
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import identity, plan, submission

USERS: dict[str, Role] = {"root": "admin", "ann": "submit", "bob": "submit", "eve": "read"}
NODES = [Node("n0", {"CPU": 4.0}, {"CPU": 4.0}), Node("n1", {"CPU": 4.0}, {"CPU": 4.0})]


class FakeHub:
    """A hub without a loop, a cluster or MLflow."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = ServiceSettings(home=str(home), **settings)
        self.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.ended = False
        with self.ledger.writing() as connection:
            for name, role in USERS.items():
                auth.set_user(connection, name, role, f"token-of-{name}", time.time())

    def waits(self) -> dict[str, Any]:
        return {}

    def nodes(self) -> list[Node]:
        return NODES

    def cluster(self) -> ClusterView:
        return ClusterView(state="ready", nodes=[])

    def tracking_uri(self) -> str:
        return "http://127.0.0.1:1"

    def driver_log(self, submission_id: str) -> str:
        return f"driver of {submission_id}"

    def examine(self) -> list[Check]:
        return [Check(name="nodes", ok=True, found="2 nodes")]

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        return Staging(
            staging=f"stage-{0:016x}",
            nodes=[StagedNode(node="n0", address=uris[0], state="running")],
        )

    def staging(self, name: str) -> Staging:
        return Staging(staging=name, nodes=[])

    def experiment_id(self, name: str) -> str:
        return ""

    def measures(self) -> Measures:
        return Measures()

    def touch(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub(tmp_path)
    yield hub
    hub.ledger.close()


class Http:
    """Requests to an app in this process. An exception in a route is a 500, as of a server."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, options))

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    def __getattr__(self, method: str) -> Any:
        return lambda path, **options: self.request(method, path, **options)


@pytest.fixture
def http(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Http:
    monkeypatch.setattr(failures, "_FIRST_S", 0.0)  # test_front.py has the slowing down
    return Http(build_app(hub, "1"))


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-of-{name}"}


def post(http: Http, name: str = "ann", **fields: Any) -> httpx.Response:
    plans = fields.pop("plans", (plan("a", identity(name)),))
    body = submission(*plans, **fields).model_dump_json()
    return http.post("/v1/studies", content=body, headers=by(name))


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


def routes(http: Http) -> list[tuple[str, str]]:
    paths = http.get("/openapi.json").json()["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]


# --- who ------------------------------------------------------------------------------------------


def test_no_route_but_health_answers_without_a_token(http):
    for method, path in routes(http):
        address = path.replace("{action}", "cancel").format(
            study="s", trial="t", sha256="0" * 64, name="n"
        )
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic token-of-root"},
        ):
            response = http.request(method, address, headers=headers)
            assert response.status_code == (200 if path == "/v1/health" else 401), (method, path)
    assert len(routes(http)) >= 20


def test_a_read_token_reads_and_changes_nothing(http, hub):
    study = post(http).json()["study"]
    for method, path in routes(http):
        address = path.replace("{action}", "cancel").format(
            study=study, trial=f"{study}-000", sha256="0" * 64, name="eve"
        )
        response = http.request(
            method, address, headers=by("eve"), params={"identity": "0"}, json={"priority": 1}
        )
        expected = (
            403 if method in ("post", "put", "delete") or path == "/v1/users" else (200, 400, 404)
        )
        assert response.status_code in (expected if isinstance(expected, tuple) else (expected,)), (
            method,
            path,
        )
    assert http.get(f"/v1/studies/{study}", headers=by("ann")).json()["state"] == "active"
    assert not hub.ended


def test_a_submitter_steers_only_their_own_studies(http):
    study = post(http).json()["study"]
    for path in ("cancel", "pause", "resume", "retry"):
        refused(http.post(f"/v1/studies/{study}/{path}", headers=by("bob")), 403, "is ann's")
    refused(http.post(f"/v1/trials/{study}-000/cancel", headers=by("bob")), 403, "is ann's")
    refused(
        http.post(f"/v1/studies/{study}/priority", headers=by("bob"), json={"priority": 9}),
        403,
        "is ann's",
    )
    refused(http.delete(f"/v1/studies/{study}", headers=by("bob")), 403, "is ann's")
    refused(http.post("/v1/shutdown", headers=by("ann")), 403, "needs 'admin'")
    for changed in (True, False):
        answer = http.post(f"/v1/studies/{study}/cancel", headers=by("ann")).json()
        assert (answer["state"], answer["changed"]) == ("cancelled", changed)
    assert http.post(f"/v1/trials/{study}-000/cancel", headers=by("ann")).json()["changed"] is False
    assert http.delete(f"/v1/studies/{study}", headers=by("root")).status_code == 200


def test_an_administrator_gives_and_takes_access(http, hub):
    token = http.put("/v1/users/new", headers=by("root"), json={"role": "submit"}).json()["token"]
    assert (
        http.get("/v1/info", headers={"Authorization": f"Bearer {token}"}).json()["user"] == "new"
    )
    assert http.delete("/v1/users/new", headers=by("root")).status_code == 200
    assert http.get("/v1/info", headers={"Authorization": f"Bearer {token}"}).status_code == 401
    refused(http.delete("/v1/users/root", headers=by("root")), 400, "is you")
    listed = http.get("/v1/users", headers=by("root")).json()["users"]
    assert [user["name"] for user in listed] == ["ann", "bob", "eve", "root"]
    stored = (
        Path(hub.settings.home, "ledger.db").read_bytes()
        + Path(hub.settings.home, "ledger.db-wal").read_bytes()
    )
    assert b"token-of-ann" not in stored
    assert token.encode() not in stored


def test_users_and_refused_logins_are_events_that_a_flood_does_not_fill(http):
    assert http.put("/v1/users/new", json={"role": "read"}, headers=by("root")).status_code == 200
    assert http.delete("/v1/users/new", headers=by("root")).status_code == 200
    for _ in range(20):
        assert http.get("/v1/queue", headers={"Authorization": "Bearer x"}).status_code == 401
    events = http.get("/v1/events", headers=by("eve")).json()["events"]
    told = [(event["kind"], event["cause"]) for event in events]
    assert told[:2] == [
        ("user-token", "new, role read, by root"),
        ("user-removed", "new, by root"),
    ]
    assert [kind for kind, _ in told[2:]] == ["login-refused"] * 2
    assert [cause.rpartition(", ")[2] for _, cause in told[2:]] == ["failure 1", "failure 10"]


def test_tokens_stay_out_of_logs(http, caplog):
    with caplog.at_level(logging.DEBUG):
        post(http)
        http.get("/v1/studies", headers=by("ann"))
    assert "token-of" not in caplog.text


# --- what is refused ------------------------------------------------------------------------------


def test_a_submission_is_checked_in_one_line(http):
    refused(post(http, plans=(plan("a"), plan("a", identity("b")))), 400, "key 'a' occurs twice")
    refused(post(http, code="0" * 64), 400, "was not uploaded")
    refused(post(http, gpu_hours=3), 400, "has no effect")
    many = {"ranks": 9, "cpus_per_rank": 1}
    body = json.loads(submission(plan("a")).model_dump_json())
    body["study"]["resources"] = many
    answer = http.post("/v1/studies", json=body, headers=by("ann"))
    refused(answer, 400, "needs 9 ranks x 1 CPU; the whole cluster holds 8 CPUs on 2 nodes")
    body["study"]["resources"] = {"ranks": 8, "max_nodes": 1}
    refused(http.post("/v1/studies", json=body, headers=by("ann")), 400, "on at most 1 node")
    body["study"]["nonsense"] = 1
    refused(http.post("/v1/studies", json=body, headers=by("ann")), 400, "study.nonsense")
    refused(http.post("/v1/studies", content=b"{", headers=by("ann")), 400, "JSON")


def test_a_plan_is_refused_what_a_submission_would_be(http, hub):
    body = json.loads(submission(plan("a"), resources={"ranks": 9}).model_dump_json())
    answer = http.post("/v1/studies/check", json=body, headers=by("ann"))
    refused(answer, 400, "needs 9 ranks x 1 CPU; the whole cluster holds 8 CPUs on 2 nodes")
    body["study"]["resources"]["ranks"] = 8
    body["code"] = "0" * 64  # a plan uploads none
    answer = http.post("/v1/studies/check", json=body, headers=by("ann"))
    assert (answer.status_code, answer.json()) == (200, {"trials": 1})
    assert http.get("/v1/studies", headers=by("ann")).json() == {"studies": []}


def test_a_study_of_finished_trials_needs_no_cluster(http, hub):
    source = post(http, plans=(plan("a"),)).json()["study"]
    with hub.ledger.writing() as transaction:
        changes.move_trial(transaction, f"{source}-000", ["queued"], state="done")
    assert post(http, plans=(plan("a"),), resources={"ranks": 900}).status_code == 200
    study = post(http, plans=(plan("a"),)).json()["study"]
    [trial] = http.get(f"/v1/studies/{study}", headers=by("ann")).json()["trials"]
    assert trial["cached_name"] == f"{source}:a"


def test_forgetting_names_what_it_keeps_and_spares_what_others_borrow(http, hub):
    source = post(http, plans=(plan("a"),)).json()["study"]
    with hub.ledger.writing() as transaction:
        changes.move_trial(transaction, f"{source}-000", ["queued"], state="done")
        changes.end_study_if_over(transaction, source, time.time())
    borrower = post(http, plans=(plan("b"),)).json()["study"]
    folder = Path(hub.settings.home) / "studies" / source
    (folder / f"{source}-000").mkdir(parents=True)
    (folder / f"{source}-000" / "result.json").write_text("12345")
    kept = http.get(f"/v1/studies/{source}/keeps", headers=by("ann")).json()
    assert (kept["folder"], kept["bytes"], kept["forgotten"]) == (str(folder), 5, False)
    assert kept["borrowers"] == [f"{borrower}:b"]
    answer = http.delete(f"/v1/studies/{source}?files=true", headers=by("ann"))
    refused(answer, 400, f"its files are the result of {borrower}:b")
    assert http.delete(f"/v1/studies/{borrower}", headers=by("ann")).status_code == 200
    answer = http.delete(f"/v1/studies/{source}?files=true", headers=by("ann"))
    assert answer.json()["deleted"]
    assert not folder.exists()
    assert folder.parent.exists()


def test_a_growing_cluster_refuses_what_its_largest_shape_will_never_hold(tmp_path):
    shapes = ({"resources": {"CPU": 16}, "count": 2},)
    hub = FakeHub(tmp_path, autoscale=True, node_shapes=shapes)
    http = Http(build_app(hub, "1"))
    assert post(http, resources={"ranks": 32}).status_code == 200
    refused(
        post(http, resources={"ranks": 33}),
        400,
        "the whole cluster holds 32 CPUs on 2 nodes at its largest",
    )
    refused(post(http, resources={"ranks": 17, "max_nodes": 1}), 400, "at its largest")
    hub.ledger.close()


def test_what_a_database_cannot_hold_is_refused(http):
    for run in ({"lr": math.nan}, {"name": "a\0b"}):
        body = json.loads(submission(plan("a")).model_dump_json())
        body["trials"][0]["run"] = run
        response = http.post("/v1/studies", content=json.dumps(body), headers=by("ann"))
        assert response.status_code == 400, run
    assert http.get("/v1/studies/a%00b", headers=by("ann")).status_code == 400


def test_the_list_of_studies_counts_trials_and_can_leave_them_out(http):
    study = post(http, plans=(plan("a", identity("a")), plan("b", identity("b")))).json()["study"]
    (whole,) = http.get("/v1/studies", headers=by("eve")).json()["studies"]
    (light,) = http.get("/v1/studies?trials=false", headers=by("eve")).json()["studies"]
    assert (len(whole["trials"]), whole["counts"], light["trials"], light["counts"]) == (
        2,
        {"queued": 2},
        [],
        {"queued": 2},
    )
    http.post(f"/v1/trials/{study}-001/cancel", headers=by("ann"))
    assert http.get(f"/v1/studies/{study}", headers=by("eve")).json()["counts"] == {
        "cancelled": 1,
        "queued": 1,
    }


def test_the_same_key_of_two_owners_is_two_studies(http):
    first = post(http, idempotency_key="k").json()
    assert post(http, idempotency_key="k").json() == {**first, "created": False}
    assert post(http, "bob", idempotency_key="k").json()["study"] != first["study"]


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("{root}/coco", True),
        ("s3://bucket/maskray/coco", True),
        ("/etc/passwd", False),
        ("{root}/../secret", False),
        ("{root}-other/coco", False),
        ("{root}/link/passwd", False),
        ("../../etc/passwd", False),
        ("~/coco", False),
        ("file:///etc/passwd", False),
        ("s3://bucket/maskray/../other", False),
        ("s3://bucket/maskray/%2e%2e/other", False),
        ("s3://other/maskray/coco", False),
        ("gs://bucket/maskray/coco", False),
    ],
)
def test_studies_name_paths_inside_the_roots_only(tmp_path, value, allowed):
    root = tmp_path / "data"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    hub = FakeHub(tmp_path, roots=(str(root), "s3://bucket/maskray"))
    made = plan("a").model_copy(update={"run": {"data": {"train": [value.format(root=root)]}}})
    http = Http(build_app(hub, "1"))
    for fields in ({"plans": (made,)}, {"storage": value.format(root=root)}):
        response = post(http, **fields)
        if allowed:
            assert response.status_code == 200, response.text
        else:
            refused(response, 400, "outside the service's roots")
    hub.ledger.close()


def test_a_relative_path_is_the_codes_own_but_no_place_to_store(tmp_path):
    hub = FakeHub(tmp_path, roots=(str(tmp_path / "data"),))
    http = Http(build_app(hub, "1"))
    made = plan("a").model_copy(update={"run": {"data": {"train": ["coco/train"]}}})
    assert post(http, plans=(made,)).status_code == 200
    refused(post(http, storage="coco/train"), 400, "outside the service's roots")
    hub.ledger.close()


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/coco", "gs://token@bucket/coco"])
def test_credentials_in_a_uri_never_reach_the_ledger(http, hub, uri):
    made = plan("a").model_copy(update={"run": {"data": {"train": [uri]}}})
    for fields in ({"plans": (made,)}, {"storage": uri}):
        response = post(http, **fields)
        refused(response, 400, "holds credentials")
        assert uri not in response.text
    for name in ("storage", "mlflow"):
        with pytest.raises(ValueError, match="holds credentials"):
            ServiceSettings(home="h", **{name: uri})
    assert (
        post(
            http, plans=(plan("a").model_copy(update={"run": {"note": "s3://bucket/a@b"}}),)
        ).status_code
        == 200
    )


# --- packages -------------------------------------------------------------------------------------


def packed(name: str, text: str = "x", attributes: int = 0) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = attributes << 16
        archive.writestr(entry, text)
    return data.getvalue()


def put_code(http: Http, data: bytes, name: str = "") -> httpx.Response:
    sha256 = name or hashlib.sha256(data).hexdigest()
    return http.put(f"/v1/code/{sha256}", content=data, headers=by("ann"))


def test_a_staging_names_a_uri_that_the_service_may_read(tmp_path):
    hub = FakeHub(tmp_path, roots=("s3://data",))
    http = Http(build_app(hub, "1"))
    for uri, status, words in (
        ("s3://data/coco", 200, ""),
        ("s3://other/coco", 400, "outside the service's roots"),
        ("s3://key:secret@data/coco", 400, "holds credentials"),
        ("/data/coco", 400, "uris.0: "),
        ("file:///data/coco", 400, "uris.0: "),
    ):
        answer = http.post("/v1/staging", headers=by("ann"), json={"uris": [uri]})
        assert answer.status_code == status
        assert words in answer.text
    refused(
        http.post("/v1/staging", headers=by("eve"), json={"uris": ["s3://data/coco"]}),
        403,
        "needs 'submit'",
    )
    refused(http.get(f"/v1/staging/stage-{1:016x}", headers=by("eve")), 404, "stage again")
    refused(http.get("/v1/staging/doctor-1", headers=by("eve")), 400, "name")
    hub.ledger.close()


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"custom_per_rank": {"CPU": 0}}, "'CPU' is no custom resource; use cpus_per_rank"),
        ({"custom_per_rank": {"x": -1}}, "x is -1; give 0.0001 to 1e+06"),
        (
            {"cpus_per_rank": 1e-320},
            "cpus_per_rank: Input should be greater than or equal to 0.0001",
        ),
        ({"gpus_per_rank": 1e-9}, "is 1e-09; Ray counts in steps of 0.0001"),
        (
            {"ranks": 2, "gpus_per_rank": 0.25},
            "2 ranks with gpus_per_rank 0.25 would share a GPU, and NCCL takes one rank a GPU",
        ),
    ],
)
def test_resources_that_cannot_be_counted_are_refused(http, resources, words):
    body = json.loads(submission(plan("a", identity("a"))).model_dump_json())
    body["study"]["resources"] |= resources
    refused(http.post("/v1/studies", content=json.dumps(body), headers=by("ann")), 400, words)


def test_a_key_belongs_to_one_study_in_every_field(http):
    first = post(http, idempotency_key="k")
    assert post(http, idempotency_key="k").json() == {**first.json(), "created": False}
    refused(
        post(http, idempotency_key="k", priority=50),
        400,
        "which is another one (priority); give another key",
    )
    refused(
        post(http, idempotency_key="k", fresh=True),
        400,
        "which is another one (fresh); give another key",
    )


def test_a_query_cannot_lead_out_of_the_roots(tmp_path):
    hub = FakeHub(tmp_path, roots=("s3://data?region=eu", "s3://plain"))
    http = Http(build_app(hub, "1"))
    for uri, status in (
        ("s3://data/coco?region=eu", 200),
        ("s3://data/coco?region=eu&endpoint_override=127.0.0.1:1", 400),
        ("s3://plain/coco?endpoint_override=169.254.169.254&scheme=http", 400),
    ):
        assert (
            http.post("/v1/staging", headers=by("ann"), json={"uris": [uri]}).status_code == status
        )
    hub.ledger.close()


def test_a_code_package_is_kept_under_its_hash(http):
    data = packed("model/__init__.py")
    sha256 = hashlib.sha256(data).hexdigest()
    assert http.head(f"/v1/code/{sha256}", headers=by("ann")).status_code == 404
    assert put_code(http, data).json() == {"code": sha256, "bytes": len(data)}
    assert http.head(f"/v1/code/{sha256}", headers=by("ann")).status_code == 200
    refused(put_code(http, data, "0" * 64), 400, "send it again")
    refused(put_code(http, data, "x"), 400, "64 hexadecimal digits")
    refused(put_code(http, b"no zip"), 400, "is no zip")


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "a\\..\\evil.py", "C:/evil.py"]
)
def test_a_package_cannot_leave_its_folder(http, name):
    refused(put_code(http, packed(name)), 400, "leaves the package")


def test_a_package_holds_no_links_and_no_bomb(http, hub):
    refused(put_code(http, packed("link", "/etc/passwd", 0o120777)), 400, "leaves the package")
    refused(put_code(http, b"0" * ((hub.settings.max_code_mib << 20) + 1)), 413, "larger than")


def test_ids_cannot_walk_through_the_storage(http):
    study = post(http).json()["study"]
    for trial in ("..%2f..%2fetc", "../../etc/passwd", f"{study}-000%2f..%2f..", "%2e%2e"):
        assert http.get(f"/v1/trials/{trial}/logs", headers=by("ann")).status_code == 404
    assert http.get(f"/v1/trials/{study}-000/logs?rank=-2", headers=by("ann")).status_code == 400


def test_links_of_a_trial_lead_no_logs_out_of_its_folder(http, hub, tmp_path):
    study = post(http, "ann").json()["study"]
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "rank-0.log").write_text("the token")
    attempts.start_attempt(hub.ledger, f"{study}-000", 1.0, "free")
    folder = Path(hub.settings.home) / "studies" / study
    (folder / f"{study}-000/attempts").mkdir(parents=True)
    (folder / f"{study}-000/attempts/1").symlink_to(secret)
    logs = http.get(f"/v1/trials/{study}-000/logs", headers=by("ann"))
    refused(logs, 400, "lies below a file or a link")


def test_a_zip_that_lies_about_a_file_is_refused(http):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", "x" * 100_000)
    # the central directory, from which sizes are read, says 10 bytes
    data = packed.getvalue()
    size = (100_000).to_bytes(4, "little")
    at = data.rindex(size)
    lie = data[:at] + (10).to_bytes(4, "little") + data[at + 4 :]
    sha256 = hashlib.sha256(lie).hexdigest()
    refused(http.put(f"/v1/code/{sha256}", content=lie, headers=by("ann")), 400, "code: ")


def test_a_relative_storage_stays_within_the_roots(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path, roots=[str(tmp_path)])
    http = Http(build_app(hub, "1"))
    monkeypatch.chdir("/")
    refused(post(http, storage="var/studies"), 400, "'/var/studies' is outside")
    monkeypatch.chdir(tmp_path)
    assert post(http, storage="studies").status_code == 200
    hub.ledger.close()


# --- anything -------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["..", "0", "-1", "1e400", "\0", "null"]
)
numbers = st.integers(-(2**70), 2**70) | st.floats() | words


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_that_comes_in_breaks_the_service(http, data):
    """Every route with odd ids, odd parameters and odd bodies: no answer is a 5xx."""
    method, path = data.draw(st.sampled_from(sorted(routes(http))))
    if path == "/v1/shutdown":
        return
    study = post(http, idempotency_key="fuzz").json().get("study", "forgotten")
    known = {"a study": study, "a trial": f"{study}-000"}
    ids = st.sampled_from([*known, "0" * 64, "cancel"]) | words
    for name in ("study", "trial", "sha256", "name", "action"):
        drawn = data.draw(ids)
        value = "".join(f"%{byte:02x}" for byte in known.get(drawn, drawn).encode()) or "x"
        path = path.replace(f"{{{name}}}", value)
    params = {
        name: data.draw(numbers)
        for name in ("after", "attempt", "rank", "offset", "identity", "study")
        if data.draw(st.booleans())
    }
    params["wait_s"] = 0
    body = data.draw(
        st.binary(max_size=40)
        | st.recursive(
            st.none() | numbers,
            lambda item: st.lists(item) | st.dictionaries(words, item),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode())
        | st.builds(lambda value: json.dumps({"priority": value, "role": value}).encode(), numbers)
        | st.builds(_bent, words, numbers)
    )
    response = http.request(method, path, params=params, content=body, headers=by("root"))
    assert response.status_code < 500, (method, path, params, body, response.text)


def _bent(name: str, value: Any) -> bytes:
    """A good submission with one field gone wrong."""
    body = json.loads(submission(plan("a", identity(name))).model_dump_json())
    field = (*body, *body["study"], *body["trials"][0])[len(name) + 8 * isinstance(value, str)]
    for record in (body, body["study"], body["trials"][0]):
        if field in record:
            record[field] = value
    return json.dumps(body).encode()
