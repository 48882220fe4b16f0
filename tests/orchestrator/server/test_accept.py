"""What a submission is refused, and which paths it may name."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import event

from orchestrator.ledger import changes
from orchestrator.server.api import build_app
from orchestrator.settings import ServiceSettings
from tests.orchestrator.fake_hub import FakeHub, Http, by, post, refused
from tests.orchestrator.submissions import identity, plan, submission


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


def test_a_study_of_finished_trials_needs_no_cluster(http, hub):
    source = post(http, plans=(plan("a"),)).json()["study"]
    with hub.ledger.writing() as transaction:
        changes.move_trial(transaction, f"{source}-000", ["queued"], state="done")
    assert post(http, plans=(plan("a"),), resources={"ranks": 900}).status_code == 200
    told: list[str] = []
    event.listen(hub.ledger.engine, "before_cursor_execute", lambda *given: told.append(given[2]))
    study = post(http, plans=(plan("a"),)).json()["study"]
    assert sum("trials.cached_from = " in one for one in told) == 1, "results are looked up once"
    [trial] = http.get(f"/v1/studies/{study}", headers=by("ann")).json()["trials"]
    assert trial["cached_name"] == f"{source}:a"


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


def test_a_key_belongs_to_one_study_in_every_field(http):
    first = post(http, idempotency_key="k").json()
    assert post(http, idempotency_key="k").json() == {**first, "created": False}
    assert post(http, "bob", idempotency_key="k").json()["study"] != first["study"]
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


def test_a_relative_path_is_the_codes_own_and_as_storage_stays_within_the_roots(
    tmp_path, monkeypatch
):
    hub = FakeHub(tmp_path, roots=[str(tmp_path)])
    http = Http(build_app(hub, "1"))
    monkeypatch.chdir("/")
    refused(post(http, storage="var/studies"), 400, "'/var/studies' is outside")
    made = plan("a").model_copy(update={"run": {"data": {"train": ["coco/train"]}}})
    assert post(http, plans=(made,)).status_code == 200
    monkeypatch.chdir(tmp_path)
    assert post(http, storage="studies").status_code == 200
    hub.ledger.close()


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
