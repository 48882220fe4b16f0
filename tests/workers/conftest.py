"""The data and servers that several tests of the workers start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as in the ranks of `run_ranks`.

    The number of threads changes how torch's sums round, and the tests compare bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a training and a validation set: 16 and 4 images of 64 px, 4 categories."""
    folder = tmp_path_factory.mktemp("packed")
    synthesise(folder, num_images=20, size=64, seed=0)
    for name in ("train", "val"):
        annotations = [folder / "annotations" / f"instances_{name}.json"]
        pack(annotations, str(folder / "images" / name), str(folder / name), PackOptions())
    return str(folder / "train"), str(folder / "val")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with empty tables. Tests copy it, since making one takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an MLflow store of this module's own."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store'))}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder of a bucket, by a URI that carries all that pyarrow needs."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    os.environ.pop("AWS_PROFILE", None)
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(
        Bucket="trials"
    )
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://trials/{name}?region=us-east-1&scheme=http&endpoint_override={quote(s3_server.removeprefix('http://'))}"
