"""Filling every node's cache: the jobs really run, a stand-in takes the place of Ray."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.jobs import Job, UnreachableError
from orchestrator.cluster.nodes import Machine
from orchestrator.cluster.staging import begin, look
from orchestrator.settings import ServiceSettings
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise

MACHINES = [Machine("a" * 56, "10.0.0.1", True), Machine("b" * 56, "10.0.0.2", False)]


class PlayedCluster:
    """Runs a job to its end when it is submitted; with `held` the job goes on for ever."""

    url = "http://ray"

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self.logs: dict[str, str] = {}
        self.held = False

    def machines(self) -> list[Machine]:
        return MACHINES

    def jobs(self) -> dict[str, Job]:
        return dict(self.known)

    def forget(self, name: str) -> None:
        del self.known[name]

    def log(self, name: str) -> str:
        return self.logs[name]

    def submit(
        self,
        name: str,
        entry: str,
        environment: Mapping[str, str],
        package: str,
        metadata: Mapping[str, str],
        node: str,
    ) -> None:
        state, self.logs[name] = "RUNNING", "runtime env is ready\nfetching 3/9\n"
        if not self.held:
            ended = subprocess.run(
                entry, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            state, self.logs[name] = ("FAILED" if ended.returncode else "SUCCEEDED"), ended.stdout
        self.known[name] = Job(name, state, "", 0, node, metadata)  # type: ignore[arg-type]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    synthesise(tmp_path / "drawn", num_images=10, size=32, seed=1)
    annotations = [tmp_path / "drawn/annotations/instances_train.json"]
    pack(annotations, str(tmp_path / "drawn/images/train"), str(tmp_path / "packed"), PackOptions())
    return tmp_path / "packed"


def started(cluster: Any, packed: Path, now: float = 1000.0) -> Any:
    settings = ServiceSettings(
        home=str(packed.parent), entry=(sys.executable, "-m", "workers.ray_entry")
    )
    return begin(cluster, settings, [str(packed)], 1.0, now)


def test_every_node_says_what_it_has(packed):
    cluster = PlayedCluster()
    staging = started(cluster, packed)
    assert [(node.node, node.address, node.state, node.error) for node in staging.nodes] == [
        (machine.id, machine.address, "done", "") for machine in MACHINES
    ]
    assert {(node.done, node.total) for node in staging.nodes} == {(2, 2)}  # the index and a shard
    assert {(node.cache, node.bytes, node.evicted) for node in staging.nodes} == {("", 0, 0)}, (
        "it is on this machine"
    )
    assert look(cluster, staging.staging) == staging


def test_a_node_that_still_fetches_tells_how_far_it_is(packed):
    cluster = PlayedCluster()
    cluster.held = True
    assert {(node.state, node.done, node.total) for node in started(cluster, packed).nodes} == {
        ("running", 3, 9)
    }


def test_a_node_that_cannot_tells_why(packed):
    shutil.rmtree(packed)
    for node in started(PlayedCluster(), packed).nodes:
        assert node.state == "failed"
        assert str(packed) in node.error


def test_what_ended_is_forgotten_once_nobody_can_be_following_it(packed):
    cluster = PlayedCluster()
    first = started(cluster, packed, now=1000.0)
    started(cluster, packed, now=1001.0)
    assert len(look(cluster, first.staging).nodes) == 2
    third = started(cluster, packed, now=10_000.0)
    assert not look(cluster, first.staging).nodes
    assert len(cluster.known) == len(third.nodes) == 2


def test_a_cluster_that_comes_up_is_named(packed, monkeypatch):
    cluster = PlayedCluster()
    monkeypatch.setattr(cluster, "machines", list)
    with pytest.raises(UnreachableError, match="has no node yet"):
        started(cluster, packed)
