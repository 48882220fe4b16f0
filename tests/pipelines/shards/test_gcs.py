"""A dataset behind gs://, as Google's storage emulator serves it over HTTP on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from gcp_storage_emulator.server import create_server

from contract.command import run_app
from pipelines.__main__ import app
from pipelines.shards.dataset import open_dataset
from tests.pipelines.shards.test_remote import contents


@pytest.fixture
def bucket() -> Iterator[str]:
    """The query of a URI that leads to the emulator, which has one bucket, `data`."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    server.start()
    try:
        host, port = server._api._httpd.socket.getsockname()
        yield f"?endpoint_override={host}:{port}&scheme=http"
    finally:
        server.stop()


def test_a_dataset_in_a_gcs_bucket_is_packed_read_and_left_alone(bucket, shapes, tmp_path, capsys):
    uri = f"gs://anonymous@data/train{bucket}"
    annotations, images = shapes / "annotations/instances_train.json", shapes / "images/train"
    command = [
        "data",
        "pack",
        "--annotations",
        str(annotations),
        "--images",
        str(images),
        "--out",
        uri,
    ]
    told = []
    for _ in range(2):
        assert (
            run_app(app, [*command, "--shard-mib", "0.01", "--workers", "1", "--json"], "maskray")
            == 0
        )
        told.append(json.loads(capsys.readouterr().out))
    local = open_dataset(str(shapes / "train"))
    assert [answer["unchanged"] for answer in told] == [False, True]
    remote = open_dataset(uri, str(tmp_path / "cache"))
    assert contents(remote) == contents(local)
    assert run_app(app, ["data", "verify", uri], "maskray") == 0
