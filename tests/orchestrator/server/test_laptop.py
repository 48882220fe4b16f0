"""What a client gets that knows a URL and a token, and reaches no storage."""

from __future__ import annotations

import io
import os
import zipfile

import pytest

from orchestrator.server.api import build_app
from orchestrator.study.datasets import read_manifest
from tests.orchestrator.fake_hub import FakeHub, Http, by, refused
from tests.orchestrator.server.front.test_front import House
from tests.orchestrator.studies import write_dataset
from tests.orchestrator.submissions import plan, submission


@pytest.fixture
def hub(tmp_path):
    hub = FakeHub(tmp_path, roots=[str(tmp_path / "data")])
    yield hub
    hub.ledger.close()


def test_a_manifest_comes_through_the_service_from_its_roots_alone(hub, tmp_path):
    http = Http(build_app(hub, "1"))
    data, outside = (write_dataset(tmp_path / name) for name in ("data", "outside"))

    def ask(uri, name="eve"):
        return http.get("/v1/manifests", params={"uri": str(uri)}, headers=by(name))

    raw = (data / "train/manifest.json").read_bytes()
    assert (ask(data / "train").status_code, ask(data / "train").content) == (200, raw)
    assert ask(data / "train", "nobody").status_code == 401
    assert "outside the service's roots" in ask(outside / "train").json()["detail"]
    assert ask(data / "absent").status_code == 404
    (data / "val/manifest.json").write_text('{"token": "secret"}')
    assert "no manifest" in ask(data / "val").json()["detail"]
    (data / "val/manifest.json").unlink()
    os.mkfifo(data / "val/manifest.json")
    assert ask(data / "val").status_code == 404


def test_planning_asks_the_service_for_what_is_not_here(tmp_path, monkeypatch):
    house = House(tmp_path)
    try:
        data = write_dataset(tmp_path / "data")
        here = read_manifest(str(data / "train"), "data.train")
        monkeypatch.setenv("MASKRAY_SERVER", house.url)
        monkeypatch.setenv("MASKRAY_TOKEN", "token-of-ann")
        monkeypatch.setattr("contract.files.Files.read_part", lambda *_: None)  # of a laptop
        assert read_manifest(str(data / "train"), "data.train") == here
        with pytest.raises(ValueError, match=r"data\.val: .*absent.*the service says"):
            read_manifest(str(data / "absent"), "data.val")
    finally:
        house.close()


def test_a_report_comes_through_the_service_to_every_reader(hub):
    http = Http(build_app(hub, "1"))
    sent = submission(plan("a"))
    study = http.post("/v1/studies", content=sent.model_dump_json(), headers=by("ann")).json()
    path = f"/v1/studies/{study['study']}/report"
    answer = http.get(path, headers=by("eve"))
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {"report.html", "table.txt", "table.csv", "report.json"} <= set(archive.namelist())
    assert http.get(path, params={"form": "md"}, headers=by("eve")).text.startswith(("#", "|", "*"))
    sent = http.put(path, content=answer.content, headers=by("ann"))  # by an old client
    refused(sent, 410, "the service makes the report itself; send none")
