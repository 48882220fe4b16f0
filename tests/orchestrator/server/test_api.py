"""The HTTP interface without a cluster: who may do what, and what breaks it."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.ledger import changes
from tests.orchestrator.fake_hub import by, post, refused, routes
from tests.orchestrator.submissions import identity, plan, submission


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


def test_forgetting_names_what_it_keeps_and_spares_what_others_borrow(http, hub, nest):
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
    listed = http.post("/v1/gc/forgotten?apply=true", headers=by("root")).json()
    assert (listed["removals"], listed["freed_bytes"]) == ([], 0)
    refused(http.post("/v1/gc/forgotten", headers=by("ann")), 403, "admin")
    answer = http.delete(f"/v1/studies/{source}?files=true", headers=by("ann"))
    refused(answer, 400, f"its files are the result of {borrower}:b")
    assert http.delete(f"/v1/studies/{borrower}", headers=by("ann")).status_code == 200
    deep = nest(folder)  # nobody can walk it: then the ledger keeps the study, too
    answer = http.delete(f"/v1/studies/{source}?files=true", headers=by("ann"))
    refused(answer, 400, "has folders nested too deep")
    assert http.get(f"/v1/studies/{source}", headers=by("ann")).status_code == 200
    subprocess.run(["rm", "-r", str(deep)], check=True)
    answer = http.delete(f"/v1/studies/{source}?files=true", headers=by("ann"))
    assert answer.json()["deleted"]
    assert not folder.exists()
    assert folder.parent.exists()


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


def test_ids_cannot_walk_through_the_storage(http):
    study = post(http).json()["study"]
    for trial in ("..%2f..%2fetc", "../../etc/passwd", f"{study}-000%2f..%2f..", "%2e%2e"):
        assert http.get(f"/v1/trials/{trial}/logs", headers=by("ann")).status_code == 404
    assert http.get(f"/v1/trials/{study}-000/logs?rank=-2", headers=by("ann")).status_code == 400


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
