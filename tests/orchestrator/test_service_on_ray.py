"""The local service with its real Ray head and MLflow: studies, commands, and lost processes.

One house serves the whole file, since a head takes ten seconds to start. The trials are
`fake_entry.py`, each a Ray job.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from contract.answers import StudyView, TrialView
from contract.study import Resources
from orchestrator.client import Client
from orchestrator.local import connect as local
from orchestrator.local.processes import marked_processes, recorded_child
from orchestrator.local.stack import mlflow_mark, ray_mark
from orchestrator.server.mlflow import MLflow
from tests.orchestrator.submissions import identity, plan, submission
from tests.orchestrator.waiting import wait_until

FAKE = Path(__file__).with_name("fake_entry.py")


class House:
    """A folder with its own service, whose trials are the fake entry."""

    def __init__(self, root: Path, cpus: int) -> None:
        self.root = root
        self.home = root / ".maskray"
        self.home.mkdir()
        settings = {
            "entry": [sys.executable, str(FAKE)],
            "ray_cpus": cpus,
            "ray_memory_mib": 80,
            "poll_s": 0.2,
            "grace_s": 10,
            "environment": {"MASKRAY_TEST": "1"},
            "limits": {"backoff_s": 0.2},
        }
        (self.home / "service.yaml").write_text(yaml.safe_dump(settings))

    def client(self) -> Client:
        return Client(local.ensure_local_service(self.root))

    def maskray(self, *words: str) -> tuple[Any, int]:
        """What the command prints with --json, and its exit status."""
        command = [sys.executable, "-m", "orchestrator", *words, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(FAKE.parents[2])}
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        return json.loads(done.stdout), done.returncode

    def gate(self, name: str) -> Path:
        """A trial with `gate=str(this)` takes its next step once the file exists."""
        return self.root / name

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        return wait_until(what, condition, self.home / "service-process.log")

    def ended(self, client: Client, study: str) -> StudyView:
        return self.until(
            f"end of {study}",
            lambda: _if(client.study(study), lambda v: v.state not in ("active", "paused")),
        )

    def stepping(self, client: Client, study: str, attempt: int = 1) -> TrialView:
        """The study's first trial, once this attempt of it has said something."""
        return self.until(
            f"progress of {study}",
            lambda: _if(
                client.study(study).trials[0],
                lambda t: t.progress is not None and t.progress.attempt == attempt,
            ),
        )

    def pid(self, trial: TrialView, attempt: int = 1) -> int:
        return int((Path(trial.storage) / f"attempts/{attempt}/pid").read_text())


def _if(value: Any, condition: Callable[[Any], bool]) -> Any:
    return value if condition(value) else None


@contextlib.contextmanager
def own_house(cpus: int = 2) -> Iterator[House]:
    root = Path(tempfile.mkdtemp(prefix="mr"))
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(root))
    patch.setenv("TMPDIR", str(root))
    patch.setattr(tempfile, "tempdir", None)
    for name in ("MASKRAY_SERVER", "MASKRAY_TOKEN"):
        patch.delenv(name, raising=False)
    built = House(root, cpus)
    try:
        yield built
    finally:
        local.shut_down(root)
        patch.undo()
        left = [*marked_processes(ray_mark(built.home)), *marked_processes(mlflow_mark(built.home))]
        shutil.rmtree(root)
        assert left == []


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with own_house() as house:
        yield house


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with house.client() as client:
        yield client


def test_the_folders_of_a_local_service_are_its_user_s_alone(house, client):
    """Ray opens its own folder to everybody: the one around it is closed."""
    ray = house.until("Ray", lambda: recorded_child("ray", house.home))
    assert Path(ray.folder).stat().st_mode & 0o777 == 0o700
    assert house.until("session", lambda: list(Path(ray.folder).glob("r/session_*")))
    assert house.home.stat().st_mode & 0o777 == 0o700


def kinds(client: Client, study: str) -> list[str]:
    return [event.kind for event in client.events(study).events]


def package(**files: str) -> tuple[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/") + ".py", text)
    return hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue()


def test_a_study_runs_its_errors_are_classed_and_mlflow_and_logs_keep_it(house, client):
    sha256, data = package(marker="WHO = 'the code of the study'")
    client.upload_code(sha256, data)
    plans = (
        plan("good", identity("good"), seed=1),
        plan(
            "wrong",
            identity("wrong"),
            fail="loop.steps: must be at least 1",
            **{"class": "person", "exit": 2},
        ),
    )
    made = client.submit(submission(*plans, code=sha256, name="first", idempotency_key="once"))
    assert client.submit(submission(*plans, code=sha256, name="first", idempotency_key="once")) == (
        made.model_copy(update={"created": False})
    )
    view = house.ended(client, made.study)

    good, wrong = view.trials
    assert (view.state, good.state, wrong.state) == ("failed", "done", "failed")
    assert (good.metrics["segm/AP"], good.attempts) == (0.26, 1)
    assert (wrong.error_class, wrong.error, wrong.attempts) == (
        "person",
        "loop.steps: must be at least 1",
        1,
    )
    assert kinds(client, view.study).count("done") == 1
    assert kinds(client, view.study)[-1] == "study-failed"
    assert client.logs(good.trial).text == "rank 0 of attempt 1: grüße\n"
    driver = client.logs(good.trial, rank=-1)
    assert f"attempt 1 of {good.trial}" in driver.text
    assert driver.done
    assert client.finished([good.identity]) == {good.identity: good.trial}
    spec = json.loads((Path(good.storage) / "attempts/1/spec.json").read_text())
    assert (spec["name"], spec.get("ranks", 1), spec["tracking"]["experiment"]) == (
        "good",
        1,
        view.study,
    )

    again = client.submit(submission(plans[0], name="again"))
    cached = client.study(again.study)
    assert (cached.state, cached.trials[0].cached_from) == ("done", good.trial)

    house.until("report", (Path(view.storage) / view.study / "report/report.html").is_file)
    mlflow = MLflow(client.info().mlflow_uri)
    experiment = mlflow.experiment(view.study, {})
    parents = mlflow.runs(experiment, f"tags.`maskray.parent` = '{view.study}'")
    assert len(parents) == 1
    (parent,) = house.until(
        "closed parent run", lambda: mlflow.runs(experiment, "attributes.status = 'FAILED'")
    )
    values = {metric.key: metric.value for metric in parent.data.metrics}
    assert values == {"a-good/bbox/AP/mean": 0.3}  # the primary metric: the report has the rest
    mlflow.put_artifact(parent.info.run_id, "weights a%.bin", b"12345")
    [copy] = house.root.rglob("weights a%.bin")
    for _ in range(2):  # twice is no error
        mlflow.delete_artifact(parent.info.run_id, "weights a%.bin")
        assert not copy.exists()
    assert (copy.parent / "study.yaml").exists()
    mlflow.delete_artifact("0" * 32, "weights.bin")  # of a run that is gone
    mlflow.close()


def test_a_trial_is_reproduced_once_and_a_difference_is_told(house, client):
    plans = (
        plan("same", identity("same"), seed=1),
        plan("drifts", identity("drifts"), drift=str(house.root / "drift")),
    )
    study = house.ended(client, client.submit(submission(*plans, name="first")).study)
    same, drifts = study.trials

    result, status = house.maskray("reproduce", same.trial)
    assert (status, result["agrees"], result["same_weights"], result["rule"]) == (
        0,
        True,
        True,
        "to the bit, on the CPU",
    )
    assert [pair["metric"] for pair in result["metrics"]] == ["bbox/AP", "segm/AP"]
    again = client.study(result["study"])
    assert (again.name, again.trials[0].cached_from, again.trials[0].attempts) == (
        "again-first",
        "",
        1,
    )
    spec = json.loads((Path(again.trials[0].storage) / "attempts/1/spec.json").read_text())
    assert (spec["run"]["fake"], spec["tags"]["maskray.reproduces"]) == ({}, same.trial)
    assert house.maskray("reproduce", f"{study.study}:same")[0]["study"] == result["study"], (
        "asked twice, run once"
    )

    differs, status = house.maskray("reproduce", drifts.trial)
    assert (status, differs["agrees"]) == (1, False)
    assert [pair["agrees"] for pair in differs["metrics"]] == [False, True]


def test_the_doctor_finds_the_local_head_well(house):
    result, status = house.maskray("doctor")
    assert (status, result["ok"]) == (0, True), result
    words = {check["name"]: check["found"] for check in result["checks"]}
    assert words["all-reduce"] == "one node: no pair to try"
    assert words["storage"] == f"{house.home / 'studies'} is written and read alike from everywhere"
    assert words["mlflow"].startswith("http://127.0.0.1:")
    assert not list((house.home / "studies").glob(".doctor*"))


def test_a_trial_no_machine_holds_is_refused_at_submit(client):
    with pytest.raises(
        ValueError, match="needs 99 ranks x 1 CPU; the whole cluster holds 2 CPUs on 1 node"
    ):
        client.submit(submission(resources=Resources(ranks=99)))


def test_ray_demands_its_token_and_no_secret_is_in_a_command_line_a_log_or_a_database(
    house, client
):
    ended = house.ended(
        client, client.submit(submission(plan("quiet", identity("quiet")), name="quiet")).study
    )
    assert ended.state == "done"
    url = recorded_child("ray", house.home).url
    for path in ("/api/jobs/", "/api/cluster_status"):
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code in (
            401,
            403,
        )
    files = [house.home / "token", house.home / "ray-token"]
    secrets = [file.read_bytes().strip() for file in files]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = "\0".join(process.cmdline()).encode()
            assert not [secret for secret in secrets if secret in command], process
    looked = 0
    for path in house.root.rglob("*"):
        if path.is_file() and path not in files:
            text = path.read_bytes()
            assert not [secret for secret in secrets if secret in text], path
            looked += path.suffix in (".db", ".log", ".json", ".db-wal", ".out", ".err")
    assert looked > 20


def test_a_study_is_paused_resumed_and_cancelled_at_a_checkpoint(house, client):
    gate = house.gate("pause")
    study = client.submit(submission(plan("p", identity("p"), gate=str(gate)), name="pause")).study
    house.stepping(client, study)
    assert client.act_on_study(study, "pause").state == "paused"
    house.until("pause", lambda: client.study(study).trials[0].state == "queued")
    assert [entry.why for entry in client.queue().queue] == ["its study is paused"]
    client.act_on_study(study, "resume")
    house.stepping(client, study, attempt=2)
    client.act_on_study(study, "cancel")
    view = house.ended(client, study)
    assert (view.state, view.trials[0].state, view.trials[0].attempts) == (
        "cancelled",
        "cancelled",
        2,
    )
    assert [attempt.state for attempt in view.trials[0].attempt_list] == ["stopped", "stopped"]


def test_a_killed_service_takes_up_what_ran_and_a_cancel_given_meanwhile(house, client):
    """A SIGKILL while one trial trains and another waits: both end once, in their order."""
    gate = house.gate("kill")
    plans = [plan(name, identity(name), gate=str(gate)) for name in ("k0", "k1", "k2")]
    study = client.submit(submission(*plans, name="kill", max_parallel=1)).study
    trial = house.stepping(client, study)
    ray = recorded_child("ray", house.home)
    service = recorded_child("service", house.home)
    os.kill(service.pid, signal.SIGKILL)
    house.until("death of the service", lambda: not service.alive())
    process = psutil.Process(house.pid(trial))
    assert process.is_running(), "the trial goes on without its service"
    assert process.nice() == psutil.Process().nice(), "it yields to others no more than we do"
    with house.client() as successor:
        successor.act_on_trial(f"{study}-001", "cancel")
        gate.touch()
        view = house.ended(successor, study)
        assert [t.state for t in view.trials] == ["done", "cancelled", "done"]
        assert [t.attempts for t in view.trials] == [1, 0, 1]
        assert recorded_child("ray", house.home) == ray, "the successor keeps the head that lives"
        assert [
            event.trial for event in successor.events(study).events if event.kind == "done"
        ] == [
            f"{study}-000",
            f"{study}-002",
        ]


def test_a_killed_driver_and_a_killed_head_cost_an_attempt_each_and_no_more(house, client):
    gate = house.gate("head")
    study = client.submit(
        submission(plan("h", identity("h"), gate=str(gate), steps=4), name="head")
    ).study
    os.kill(house.pid(house.stepping(client, study)), signal.SIGKILL)
    trial = house.stepping(client, study, attempt=2)
    head = recorded_child("ray", house.home)
    gcs = next(
        p for p in psutil.Process(head.pid).children(recursive=True) if p.name() == "gcs_server"
    )
    gcs.kill()
    house.until("death of the head", lambda: not head.alive())
    orphan = house.pid(trial, 2)
    house.stepping(client, study, attempt=3)
    assert not psutil.pid_exists(orphan), (
        "ranks of the old head are ended before the new one starts"
    )
    gate.touch()
    view = house.ended(client, study)
    done = view.trials[0]
    assert (done.state, done.attempts) == ("done", 3)
    assert [attempt.state for attempt in done.attempt_list] == ["lost", "lost", "done"]
    assert kinds(client, study).count("done") == 1


def test_down_leaves_no_process_and_the_next_service_goes_on(house, client):
    gate = house.gate("down")
    study = client.submit(submission(plan("d", identity("d"), gate=str(gate)), name="down")).study
    trial = house.stepping(client, study)
    url = client.connection.url
    assert local.shut_down(house.root)
    assert not psutil.pid_exists(house.pid(trial))
    assert marked_processes(ray_mark(house.home)) == []
    assert marked_processes(mlflow_mark(house.home)) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/v1/health")
    assert local.find_child("service", house.home) is None
    gate.touch()
    with house.client() as successor:
        view = house.ended(successor, study)
        assert (view.state, view.trials[0].attempts) == ("done", 2)
