"""The service on a cluster of several nodes, simulated on this machine. Ray only counts the GPUs.

One cluster serves the whole file: a head without GPUs, and nodes of two. Trials are
`gang_entry.py`: real placement groups with an actor for each rank. The last test trains for real.
The tests share the nodes, and each test leaves two of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from contract.answers import StudyView, TrialView
from contract.command import run_app
from contract.presets import run_preset
from contract.recipe import apply_overrides
from contract.study import Resources
from orchestrator.cli.app import app
from orchestrator.local.processes import own_token
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from tests.orchestrator.services import service_client, start_service
from tests.orchestrator.submissions import identity, plan, submission
from tests.orchestrator.waiting import wait_until

HERE = Path(__file__).parent
GPUS = 2  # of each node but the head

pytestmark = pytest.mark.slow


class House:
    """A cluster, and a service that drives it from outside."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.home.mkdir()
        token = root / "ray-token"
        own_token(token)
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("RAY_", "MASKRAY_"))
            },
            "HOME": str(root),
            "TMPDIR": str(root),
            "PYTHONPATH": str(HERE.parents[1]),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
        }
        self.log = (root / "nodes.log").open("w")
        self.nodes = subprocess.Popen(
            [sys.executable, str(HERE / "ray_nodes.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        head = self.ask(add={"num_cpus": 2})
        self.two = [self.add() for _ in range(2)]
        settings = {
            "home": str(self.home),
            "port": 0,
            "ray": head["dashboard"],
            "ray_token_file": str(token),
            "mlflow": "",
            "entry": [sys.executable, str(HERE / "gang_entry.py")],
            "poll_s": 0.2,
            "grace_s": 10,
            "limits": {"backoff_s": 0.2},
        }
        self.service = start_service(settings, environment, self.log)
        self.client = service_client(settings, root / "nodes.log")
        self.until("nodes", lambda: len(self.client.info().cluster.nodes) == 3)

    def close(self) -> None:
        for process in (self.service, self.nodes):
            if process is self.nodes:
                assert process.stdin is not None
                process.stdin.close()
            else:
                process.terminate()
        for process in (self.service, self.nodes):
            process.wait(60)
        assert self.nodes.stdout is not None
        self.nodes.stdout.close()
        self.client.close()
        self.log.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.nodes.stdin is not None
        assert self.nodes.stdout is not None
        self.nodes.stdin.write(json.dumps(request) + "\n")
        self.nodes.stdin.flush()
        answer = self.nodes.stdout.readline()
        assert answer, (self.root / "nodes.log").read_text()[-3000:]
        return dict(json.loads(answer))

    def add(self) -> str:
        return str(
            self.ask(add={"num_cpus": 2, "num_gpus": GPUS, "resources": {"whole": 1}})["node"]
        )

    def replace(self, node: str) -> None:
        """Takes a node away, if it is still there, and adds another."""
        self.two.remove(node)
        self.two.append(self.add())

    def submit(self, *plans: Any, ranks: int, **fields: Any) -> str:
        resources = Resources(
            ranks=ranks, cpus_per_rank=0.5, gpus_per_rank=1, max_nodes=fields.pop("max_nodes", 0)
        )
        return str(self.client.submit(submission(*plans, resources=resources, **fields)).study)

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        return wait_until(what, condition, self.root / "nodes.log")

    def ended(self, study: str) -> StudyView:
        self.until(
            f"end of {study}", lambda: self.client.study(study).state not in ("active", "paused")
        )
        return self.client.study(study)

    def sits(self, study: str, attempt: int = 1) -> list[str]:
        """The nodes of the ranks of the study's first trial, once this attempt of it trains."""
        trial = self.until(
            f"attempt {attempt} of {study}",
            lambda: next(
                (
                    t
                    for t in self.client.study(study).trials[:1]
                    if t.progress is not None and t.progress.attempt == attempt
                ),
                None,
            ),
        )
        return list(
            json.loads((Path(trial.storage) / f"attempts/{attempt}/nodes.json").read_text())
        )


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    root = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    built = House(root)
    try:
        yield built
    finally:
        built.close()
        shutil.rmtree(root)


def test_the_doctor_sees_every_node_and_every_pair(house):
    checks = {check.name: check for check in house.client.examine()}
    assert [check for check in checks.values() if not check.ok] == []
    assert checks["nodes"].found.startswith("3 nodes: ")
    assert checks["all-reduce"].found.startswith("3 pairs over lo, ")


def test_a_dataset_is_staged_on_every_node(house, monkeypatch, capsys):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        uri = _in_a_bucket(house.root / "stage", f"127.0.0.1:{server.get_host_and_port()[1]}")
        monkeypatch.setenv("MASKRAY_SERVER", house.client.connection.url)
        monkeypatch.setenv("MASKRAY_TOKEN", house.client.connection.token)
        assert run_app(app, ["data", "stage", uri, "--json"], "maskray") == 0
        printed = json.loads(capsys.readouterr().out)
        assert (
            run_app(app, ["data", "stage", uri.replace("train", "gone"), "--json"], "maskray") == 1
        )
        refused = json.loads(capsys.readouterr().out)
    finally:
        server.stop()
    nodes = house.client.info().cluster.nodes
    assert {node["node"] for node in printed["nodes"]} == {node.id for node in nodes}
    assert {node["state"] for node in printed["nodes"]} == {"done"}
    cache = {node["cache"] for node in printed["nodes"]}.pop()
    assert (
        sum(path.stat().st_size for path in Path(cache).glob("*.arrow"))
        == printed["nodes"][0]["bytes"]
        > 0
    )
    assert len(refused["nodes"]) == len(nodes)
    assert all("gone" in node["error"] for node in refused["nodes"])


def _in_a_bucket(folder: Path, endpoint: str) -> str:
    """The URI of a small packed dataset behind a new S3 endpoint."""
    synthesise(folder / "drawn", num_images=20, size=32, seed=1)
    annotations = [folder / "drawn/annotations/instances_train.json"]
    pack(
        annotations,
        str(folder / "drawn/images/train"),
        str(folder / "train"),
        PackOptions(shard_mib=0.01),
    )
    keys = {
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "region_name": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=f"http://{endpoint}", **keys)
    client.create_bucket(Bucket="data")
    for path in (folder / "train").iterdir():
        client.upload_file(str(path), "data", f"train/{path.name}")
    client.close()
    return f"s3://data/train?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def test_a_gang_spreads_over_two_nodes_or_stays_on_one(house):
    wide = house.submit(plan("w", identity("wide")), ranks=4)
    assert sorted(house.sits(wide)) == sorted(house.two * 2)
    assert house.ended(wide).state == "done"
    narrow = house.submit(plan("n", identity("narrow")), ranks=2, max_nodes=1)
    assert len(set(house.sits(narrow))) == 1
    assert house.ended(narrow).state == "done"
    with pytest.raises(
        ValueError, match=r"3 ranks x 1 GPU .* on at most 1 node; the whole cluster holds"
    ):
        house.submit(plan("x"), ranks=3, max_nodes=1)


def test_a_lost_node_ends_the_gang_which_goes_on_once_another_is_added(house):
    gate = house.root / "lost"
    study = house.submit(plan("l", identity("lost"), gate=str(gate)), ranks=4)
    house.sits(study)
    lost = house.two[1]
    house.ask(kill=lost)
    house.until("the loss", lambda: house.client.study(study).trials[0].state == "queued")
    house.until(
        "the reason",
        lambda: "the whole cluster holds 2 GPUs" in house.client.study(study).trials[0].why,
    )
    house.replace(lost)
    assert sorted(house.sits(study, attempt=2)) == sorted(house.two * 2)
    gate.touch()
    trial = house.ended(study).trials[0]
    assert (trial.state, trial.attempts) == ("done", 2)
    assert [attempt.state for attempt in trial.attempt_list] == ["lost", "done"]


def test_a_node_that_is_preempted_is_drained_and_its_trial_goes_on_elsewhere(house):
    gate = house.root / "drain"
    study = house.submit(plan("p", identity("drain"), gate=str(gate)), ranks=2, max_nodes=1)
    node = house.sits(study)[0]
    assert house.ask(drain=node, seconds=120)["accepted"]
    elsewhere = house.sits(study, attempt=2)
    assert node not in elsewhere
    gate.touch()
    trial = house.ended(study).trials[0]
    assert (trial.state, trial.attempts) == ("done", 2)
    assert "taken away" in trial.attempt_list[0].cause
    house.ask(kill=node)
    house.replace(node)
    house.until("nodes", lambda: len(house.client.info().cluster.nodes) == 3)


def test_after_a_broken_collective_the_next_attempt_sits_elsewhere(house):
    study = house.submit(plan("c", identity("collective"), crash_at=0), ranks=2, max_nodes=1)
    trial = house.ended(study).trials[0]
    first, second = (
        set(json.loads((Path(trial.storage) / f"attempts/{attempt}/nodes.json").read_text()))
        for attempt in (1, 2)
    )
    assert (trial.state, trial.attempts) == ("done", 2)
    assert first.isdisjoint(second)


def test_two_studies_share_the_cluster_by_their_priority(house):
    gate = house.root / "share"
    low = house.submit(
        *(plan(f"l{i}", identity(f"l{i}"), gate=str(gate)) for i in range(2)), ranks=4, name="low"
    )
    house.sits(low)
    high = house.submit(plan("h", identity("h")), ranks=4, name="high", priority=5)
    waiting = house.until(
        "queue", lambda: len(house.client.queue().queue) == 2 and house.client.queue().queue
    )
    assert [entry.study_name for entry in waiting] == ["high", "low"]
    assert waiting[0].why.startswith("needs 4 ranks x 1 GPU and 0.5 CPUs; ")
    gate.touch()
    assert [house.ended(study).state for study in (high, low)] == ["done", "done"]
    starts = [event.trial for event in house.client.events().events if event.kind == "starting"]
    assert [name for name in starts if name.startswith(("low", "high"))] == [
        f"{low}-000",
        f"{high}-000",
        f"{low}-001",
    ]


@pytest.fixture(scope="module")
def training(house) -> Callable[[str], str]:
    """Submits a study of one trial: two ranks of the real entry, each on a node of its own."""
    data = house.root / "data"
    command = [sys.executable, "-m", "pipelines", "data", "synth", str(data)]
    options = ["--images", "40", "--size", "128", "--pack"]
    subprocess.run([*command, *options], cwd=HERE.parents[1], check=True, stdout=subprocess.DEVNULL)
    overrides = {
        "data.train": str(data / "train"),
        "data.val": str(data / "val"),
        "loop.steps": 16,
        "loop.global_batch": 2,
        "loop.log_every_steps": 1,
        "loop.checkpoint_every_steps": 4,
    }
    run = apply_overrides(run_preset("tiny"), overrides)
    made = plan("real", identity("real")).model_copy(update={"run": run})
    resources = Resources(ranks=2, cpus_per_rank=1, custom_per_rank={"whole": 1})
    return lambda name: str(
        house.client.submit(submission(made, resources=resources, name=name, fresh=True)).study
    )


@pytest.fixture(scope="module")
def undisturbed(house, training) -> str:
    """The hash of the last weights of a run that lost nothing."""
    return _weights(house, training("plain"), attempts=1)


def _weights(house: House, study: str, attempts: int) -> str:
    trial = house.ended(study).trials[0]
    assert (trial.state, trial.attempts) == ("done", attempts), trial.error
    assert trial.attempt_list[-1].step == 16
    return str(json.loads((Path(trial.storage) / "result.json").read_text())["weights_sha256"])


def _phase(trial: TrialView) -> str:
    return trial.progress.phase if trial.progress is not None else ""


REACHED: dict[str, Callable[[TrialView], bool]] = {
    "starting": lambda trial: _phase(trial) == "starting",
    "training": lambda trial: trial.progress is not None and trial.progress.step >= 6,
    "checkpoint": lambda trial: any(Path(trial.storage).glob("checkpoints/*")),
    "finishing": lambda trial: _phase(trial) in ("evaluating", "finishing"),
}


@pytest.mark.parametrize("phase", REACHED)
def test_a_node_lost_while_training_changes_no_bit(house, training, undisturbed, phase):
    study = training(phase)
    house.until(phase, lambda: REACHED[phase](house.client.study(study).trials[0]))
    assert sorted(house.sits(study)) == sorted(house.two)
    lost = house.two[1]
    house.ask(kill=lost)
    house.replace(lost)
    assert _weights(house, study, attempts=2) == undisturbed
