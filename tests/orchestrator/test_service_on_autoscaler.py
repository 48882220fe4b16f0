"""The service on a cluster that grows on request: Ray's own autoscaler on this machine.

The cluster begins with a head that has no GPU. The service asks for what the head of the queue
lacks. Ray starts nodes, which are processes here, the gang runs on them, and Ray takes them away
once they idle.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.answers import NodeView
from contract.study import Resources
from orchestrator.local.processes import end_processes, free_ports, marked_processes, own_token
from tests.orchestrator.services import service_client, start_service
from tests.orchestrator.submissions import identity, plan, submission
from tests.orchestrator.waiting import wait_until

HERE = Path(__file__).parent
HEAD_ID = "f" * 51 + "00000"  # as Ray's provider of pretended nodes calls its head
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

pytestmark = pytest.mark.slow


def cluster_file(path: Path, gcs: str) -> Path:
    """At most three nodes of two GPUs, which Ray takes away after six idle seconds."""
    content = {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "two-gpus": {
                "resources": {"CPU": 2, "GPU": 2},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
        "head_node_type": "ray.head.default",
        **{f"{part}setup_commands": [] for part in ("", "head_", "worker_")},
        **{f"{part}_start_ray_commands": [] for part in ("head", "worker")},
        **{name: {} for name in ("auth", "file_mounts", "docker")},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "upscaling_speed": 1,
    }
    path.write_text(json.dumps(content))
    return path


class House:
    """A head that may start nodes, and a service that drives it from outside."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.mark = root, root / "home", f"growing-{root.name}"
        self.home.mkdir()
        token = root / "ray-token"
        own_token(token)
        gcs, dashboard, client = free_ports(3)
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("RAY_", "MASKRAY_"))
            },
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "HOME": str(root),
            "TMPDIR": str(root),
            "MASKRAY_MARK": self.mark,
            "PYTHONPATH": str(HERE.parents[1]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_enable_worker_prestart": "0",
        }
        self.log = (root / "log").open("w")
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}",
            "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false",
            f"--object-store-memory={80 << 20}",
            f"--temp-dir={root / 'ray'}",
            "--num-cpus=2",
            f"--autoscaling-config={cluster_file(root / 'cluster.json', f'127.0.0.1:{gcs}')}",
        ]
        self.head = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        settings = {
            "home": str(self.home),
            "port": 0,
            "ray": f"http://127.0.0.1:{dashboard}",
            "ray_token_file": str(token),
            "mlflow": "",
            "entry": [sys.executable, str(HERE / "gang_entry.py")],
            "poll_s": 0.2,
            "grace_s": 10,
            "autoscale": True,
            "node_shapes": [{"resources": {"CPU": 2, "GPU": 2}, "count": 3}],
        }
        self.service = start_service(settings, environment, self.log)
        self.client = service_client(settings, root / "log")
        self.until("head", lambda: len(self.nodes()) == 1)

    def nodes(self) -> list[NodeView]:
        return self.client.info().cluster.nodes

    def until(self, what: str, condition: Any) -> Any:
        return wait_until(what, condition, self.root / "log")

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        end_processes(marked_processes(self.mark), 10.0)
        for process in (self.service, self.head):
            process.wait(30)
        self.log.close()


@pytest.fixture
def house() -> Iterator[House]:
    root = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    built = House.__new__(House)
    try:
        built.__init__(root)  # type: ignore[misc]
        yield built
    finally:
        built.close()
        shutil.rmtree(root)


def test_the_cluster_grows_for_the_head_of_the_queue_and_shrinks_again(house):
    resources = Resources(ranks=4, cpus_per_rank=0.5, gpus_per_rank=1)
    study = house.client.submit(submission(plan("g", identity("grow")), resources=resources)).study
    house.until("growth", lambda: len(house.nodes()) == 3)
    house.until("its end", lambda: house.client.study(study).state not in ("active", "paused"))
    trial = house.client.study(study).trials[0]
    assert (trial.state, trial.attempts) == ("done", 1), trial.error
    where = json.loads((Path(trial.storage) / "attempts/1/nodes.json").read_text())
    assert sorted(where.count(node) for node in set(where)) == [2, 2]
    assert HEAD_ID not in where
    house.until("shrinking", lambda: len(house.nodes()) == 1)
    time.sleep(3)
    assert len(house.nodes()) == 1, "nothing waits, so nothing is asked for"
