"""A cluster made of a dict, and the loop on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select

from contract.attempt import AttemptSpec, Outcome, Progress, Result
from orchestrator.cluster.jobs import Job, UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import EVENTS
from orchestrator.schedule.reconcile import Reconciler
from orchestrator.server import accept
from orchestrator.settings import Limits, ServiceSettings
from tests.orchestrator.submissions import submission


class DiedError(BaseException):
    """The service was killed here. No code of ours may catch it."""


class FakeCluster:
    """Ray as the loop sees it.

    At the `die_in`th call the service dies, before or after it took effect.
    """

    def __init__(self, cpus: float = 2.0) -> None:
        self.cpus = cpus
        self.alive: dict[str, Job] = {}
        self.specs: dict[str, AttemptSpec] = {}
        self.stops: list[str] = []
        self.down = False
        self.die_in = -1
        self.die_before = False
        self.started: list[str] = []

    def _called(self, effect: Callable[[], Any]) -> Any:
        if self.down:
            raise UnreachableError("down")
        self.die_in -= 1
        if self.die_in == 0 and self.die_before:
            raise DiedError
        result = effect()
        if self.die_in == 0:
            raise DiedError
        return result

    def session(self) -> str:
        return str(self._called(lambda: "session"))

    def nodes(self) -> list[Node]:
        used = sum(job.state == "RUNNING" and self.spoke(name) for name, job in self.alive.items())
        return [Node("n", {"CPU": self.cpus}, {"CPU": self.cpus - used})]

    def spoke(self, submission_id: str) -> bool:
        if submission_id not in self.specs:
            return False
        spec = self.specs[submission_id]
        progress = Path(spec.storage, "progress.json")
        return progress.exists() and json.loads(progress.read_text())["attempt"] == spec.attempt

    def jobs(self) -> dict[str, Job]:
        return dict(self._called(lambda: dict(self.alive)))

    def submit(
        self,
        submission_id: str,
        entry: str,
        environment: Mapping[str, str],
        package: str,
        metadata: Mapping[str, str],
    ) -> None:
        def effect() -> None:
            if submission_id not in self.alive:
                self.alive[submission_id] = Job(submission_id, "RUNNING", "", None, "n", metadata)
                data = json.loads(Path(entry.split("--spec ")[1]).read_text())
                del data["run"]  # the code package checks it
                self.specs[submission_id] = AttemptSpec.model_validate(data)
                self.started.append(submission_id)

        self._called(effect)

    def stop(self, submission_id: str) -> None:
        self._called(lambda: self.stops.append(submission_id))

    def forget(self, submission_id: str) -> None:
        self._called(lambda: self.alive.pop(submission_id, None))

    def log(self, submission_id: str) -> str:
        return str(self._called(lambda: f"log of {submission_id}"))

    # --- what ranks do ---

    def step(self, submission_id: str, step: int) -> None:
        spec = self.specs[submission_id]
        progress = Progress(
            attempt=spec.attempt, step=step, steps=9, phase="training", updated_at=0.0
        )
        Path(spec.storage, "progress.json").write_text(progress.model_dump_json())

    def end(
        self,
        submission_id: str,
        code: int | None = 0,
        outcome: Outcome | None = None,
        done: bool = True,
    ) -> None:
        spec = self.specs[submission_id]
        folder = Path(spec.storage)
        if done and code == 0:
            outcome = Outcome(state="done", step=9)
            made = Result(
                metrics={"segm/AP": 0.5},
                step=9,
                attempt=spec.attempt,
                world_size=1,
                weights_sha256="0" * 64,
            )
            (folder / "result.json").write_text(made.model_dump_json())
        if outcome is not None:
            (folder / f"attempts/{spec.attempt}/outcome.json").write_text(outcome.model_dump_json())
        state = "SUCCEEDED" if code == 0 else "FAILED"
        job = self.alive[submission_id]
        # type: ignore[arg-type]
        self.alive[submission_id] = Job(submission_id, state, "", code, "n", job.metadata)


class House:
    def __init__(self, home: Path, **fields: Any) -> None:
        limits = Limits(backoff_s=0, stall_s=100, **fields.pop("limits", {}))
        self.settings = ServiceSettings(
            home=str(home), mlflow="", ray="http://fake", limits=limits, **fields
        )
        self.ledger: Ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.cluster = FakeCluster()
        self.loop = Reconciler(self.ledger, self.settings)
        self.now = 1000.0

    def submit(self, *plans: Any, **fields: Any) -> str:
        self.now += 1
        return accept.accept(
            self.ledger, self.settings, submission(*plans, **fields), "ann", self.now
        )[0]

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            self.loop.tick(self.cluster, self.now)  # type: ignore[arg-type]

    def trial(self, trial: str) -> Any:
        with self.ledger.reading() as transaction:
            return queries.trial_row(transaction, trial)

    def state(self, trial: str) -> str:
        return str(self.trial(trial).state)

    def kinds(self, trial: str) -> list[str]:
        with self.ledger.reading() as transaction:
            return list(
                transaction.execute(select(EVENTS.c.kind).where(EVENTS.c.trial == trial)).scalars()
            )

    def act(self, action: Callable[..., None], target: str) -> None:
        with self.ledger.writing() as transaction:
            action(transaction, target, "ann", self.now)
