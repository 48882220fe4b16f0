"""Which waiting trials start now, and starting them.

What is kept here besides the ledger are measurements and answers that can be found again.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence

from pydantic import ValidationError
from sqlalchemy import select, update

from contract.attempt import SPEC_FILE
from contract.files import join
from contract.study import Resources
from orchestrator.cluster.jobs import Cluster
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import store
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import ATTEMPTS, TRIALS
from orchestrator.schedule.capacity import Bundle, request_entry, request_id, wanted
from orchestrator.schedule.decide import (
    ELSEWHERE,
    UNKNOWN,
    GiveUp,
    Running,
    Situation,
    Start,
    Stop,
    Wait,
    Waiting,
    decide,
)
from orchestrator.schedule.gang import Gang, fit, needs, take
from orchestrator.schedule.run_spec import gang_of, run_spec, study_limits
from orchestrator.settings import ServiceSettings, code_files, code_name, service_files

LOG = logging.getLogger("maskray")
_FREE = Wait("", 0, "")


class Admission:
    """waits: why each trial waits, by the last decision. mark: tells this service's jobs from those of others."""

    def __init__(self, ledger: Ledger, settings: ServiceSettings) -> None:
        self.ledger = ledger
        self.settings = settings
        self.waits: dict[str, Wait] = {}
        self.mark = ledger.name()
        self._nodes: Sequence[Node] = ()
        self._asked: list[Bundle] | None = None
        self._gangs: dict[str, Gang] = {}  # by study
        self._known_code: set[str] = set()
        self._problems: dict[str, str] = {}  # study -> what is wrong with its resources
        self._durations: dict[str, float] = {}  # seconds that a trial of this study took, at most

    def admit(self, cluster: Cluster, nodes: Sequence[Node], tracking_uri: str, now: float) -> None:
        """Starts what may start, stops what its budget ends; `waits` says why the others wait."""
        self._nodes = nodes
        with self.ledger.reading() as transaction:
            attempts = store.live_attempts(transaction)
            waiting = store.waiting_trials(transaction)
            studies = study_limits(transaction, attempts, now)
            self._measure_durations(transaction, {row["study"] for row in waiting})
        held, free = self._hold_back(waiting, attempts, now)
        situation = Situation(
            nodes=self._nodes,
            waiting=[self._waiting(row, now) for row in free],
            running=self._running(attempts),
            studies=studies,
        )
        decisions = decide(situation, self.settings.limits)
        waits = {wait.trial: wait for wait in held}
        for decision in decisions:
            match decision:
                case Start():
                    number = store.start_attempt(
                        self.ledger, decision.trial, now, decision.why, decision.avoid
                    )
                    if number:
                        self.submit(cluster, decision.trial, number, tracking_uri)
                case Stop():
                    ask_to_stop(self.ledger, decision.trial, "budget", decision.why, now)
                case GiveUp():
                    self._give_up(decision.trial, "budget", decision.why, now)
                case Wait():
                    waits[decision.trial] = decision
        self.waits = waits
        if self.settings.autoscale:
            lacking = [row for row in free if waits.get(row["id"], _FREE).lacks]
            head = min(lacking, key=lambda row: waits[row["id"]].position or 1, default=None)
            self._ask_for_capacity(cluster, attempts, head, now)

    def _ask_for_capacity(
        self, cluster: Cluster, attempts: Sequence[store.Row], head: store.Row | None, now: float
    ) -> None:
        """Sends a request when it differs from the last one; a service that was started anew sends it again."""
        gangs = [self._gang(row) for row in attempts]
        bundles = wanted(
            gangs, self._gang(head) if head is not None else None, self.settings.node_shapes
        )
        if bundles == self._asked or (not bundles and self._asked is None):
            return
        entry = f"exec {shlex.join(request_entry(bundles, self.settings.entry[0]))}"
        cluster.submit(request_id(self.mark, bundles, now), entry, {}, "", {})
        self._asked = bundles
        LOG.info("asked the cluster for %d bundles", len(bundles))

    def submit(self, cluster: Cluster, trial: str, number: int, tracking_uri: str) -> None:
        """Writes the attempt's spec and starts its job. Doing it twice does it once: the submission id is the fence."""
        with self.ledger.reading() as transaction:
            row = store.trial_row(transaction, trial)
            study = store.study_row(transaction, row["study"]) if row is not None else None
            avoid = transaction.execute(
                select(ATTEMPTS.c.avoid).where(
                    ATTEMPTS.c.trial == trial, ATTEMPTS.c.number == number
                )
            ).scalar()
        if row is None or study is None:
            return
        spec = run_spec(
            row, study, number, (avoid or "").split(), tracking_uri, self.settings.grace_s
        )
        path = SPEC_FILE.format(attempt=number)
        service_files(row["folder"]).write_json(path, spec)
        package = ""
        if study["code"]:
            package = f"_ray_pkg_{study['code'][:32]}.zip"
            cluster.upload(package, lambda: self._read_code(study["code"]))
        environment = {
            **self.settings.environment,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": f"{self.settings.grace_s + 15:.0f}",
        }
        entry = f"exec {shlex.join([*self.settings.entry, '--spec', join(row['folder'], path)])}"
        submission = f"{trial}-{number}"
        cluster.submit(
            submission, entry, environment, package, {"maskray": self.mark, "trial": trial}
        )
        with self.ledger.writing() as transaction:
            transaction.execute(
                update(ATTEMPTS)
                .where(ATTEMPTS.c.submission_id == submission, ATTEMPTS.c.state == "submitting")
                .values(state="submitted")
            )

    # --- what decide needs to know ---

    def _gang(self, row: store.Row) -> Gang:
        """One object for all trials of a study, whose spec never changes."""
        if row["study"] not in self._gangs:
            self._gangs[row["study"]] = gang_of(row["spec"])
        return self._gangs[row["study"]]

    def _waiting(self, row: store.Row, now: float) -> Waiting:
        return Waiting(
            trial=row["id"],
            study=row["study"],
            owner=row["owner"],
            gang=self._gang(row),
            priority=row["priority"],
            age_s=max(0.0, now - row["queued_at"]),
            backoff_s=max(0.0, row["not_before"] - now),
            seconds=self._durations.get(row["study"], UNKNOWN),
            suspects=tuple(row["suspects"].split()),
        )

    def _running(self, attempts: Sequence[store.Row]) -> list[Running]:
        """A gang whose ranks have said something sits somewhere: its nodes' free resources lack it already.

        Ray does not say over HTTP where, so it is put where that much is in use.
        """
        used = {
            node.id: {name: node.total[name] - node.free.get(name, 0.0) for name in node.total}
            for node in self._nodes
        }
        found = []
        for row in attempts:
            seated = row["state"] == "running" and row["progress"].get("attempt") == row["number"]
            left = row["progress"].get("seconds_left") if seated else None
            gang = self._gang(row)
            placement = (fit(gang, used) or {ELSEWHERE: gang.ranks}) if seated else {}
            take(used, gang, placement)
            seconds = UNKNOWN if left is None else float(left)
            found.append(
                Running(row["trial"], row["study"], row["owner"], gang, placement, seconds)
            )
        return found

    def _hold_back(
        self, waiting: Sequence[store.Row], attempts: Sequence[store.Row], now: float
    ) -> tuple[list[Wait], list[store.Row]]:
        """Trials that wait for something that decide does not know, and the others."""
        held: list[Wait] = []
        free: list[store.Row] = []
        under_way = self._identities([row["trial"] for row in attempts])
        first: dict[str, str] = {}  # identity -> the trial of it that waits in front
        for row in sorted(waiting, key=lambda row: (-row["priority"], row["queued_at"])):
            if problem := self._unsound(row):
                self._give_up(row["id"], "person", problem, now)
            elif row["code"] and not self._has_code(row["code"]):
                held.append(
                    Wait(row["id"], 0, "its code package is missing: submit the study's code again")
                )
            elif self.settings.ray == "local" and not self._holdable(row):
                self._give_up(
                    row["id"],
                    "person",
                    f"needs {needs(gang_of(row['spec']))}: more than this machine has",
                    now,
                )
            elif self._awaits_parent(row, now):
                held.append(Wait(row["id"], 0, "waits for the MLflow server"))
            elif not row["fresh"] and row["identity"] in under_way:
                held.append(
                    Wait(
                        row["id"],
                        0,
                        f"is the same run as trial {under_way[row['identity']]}, under way",
                    )
                )
            elif not row["fresh"] and row["identity"] in first:
                held.append(
                    Wait(
                        row["id"],
                        0,
                        f"is the same run as trial {first[row['identity']]}, which waits first",
                    )
                )
            else:
                free.append(row)
                if not row["fresh"]:
                    first[row["identity"]] = row["id"]
        place = {row["id"]: index for index, row in enumerate(waiting)}
        return held, sorted(free, key=lambda row: place[row["id"]])

    def _unsound(self, row: store.Row) -> str:
        """What is wrong with a study's resources, from a ledger that an older version filled; it must stop no other."""
        if row["study"] not in self._problems:
            try:
                Resources.model_validate(row["spec"]["resources"])
                self._problems[row["study"]] = ""
            except ValidationError as error:
                found = error.errors(include_url=False)[0]
                self._problems[row["study"]] = (
                    f"resources.{'.'.join(map(str, found['loc']))}: {found['msg']}"
                )
        return self._problems[row["study"]]

    def _has_code(self, sha256: str) -> bool:
        if sha256 not in self._known_code and code_files(self.settings).exists(code_name(sha256)):
            self._known_code.add(sha256)
        return sha256 in self._known_code

    def _read_code(self, sha256: str) -> bytes:
        data = code_files(self.settings).read_part(code_name(sha256))
        if data is None:
            self._known_code.discard(sha256)
            raise FileNotFoundError(
                f"code package {sha256[:12]} is gone from the storage; submit the study's code again"
            )
        return data

    def _holdable(self, row: store.Row) -> bool:
        return (
            not self._nodes
            or fit(self._gang(row), {node.id: node.total for node in self._nodes}) is not None
        )

    def _awaits_parent(self, row: store.Row, now: float) -> bool:
        wanted = self.settings.mlflow != "" and not row["mlflow_run_id"]
        return wanted and now - row["created_at"] < self.settings.mlflow_wait_s

    def _identities(self, trials: Sequence[str]) -> dict[str, str]:
        with self.ledger.reading() as transaction:
            query = select(TRIALS.c.identity, TRIALS.c.id).where(TRIALS.c.id.in_(trials))
            return dict(transaction.execute(query).all())

    def _measure_durations(self, transaction: Transaction, studies: set[str]) -> None:
        for study in studies:
            query = (
                select(ATTEMPTS.c.ended_at - ATTEMPTS.c.started_at)
                .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
                .where(TRIALS.c.study == study, ATTEMPTS.c.state == "done")
            )
            measured = list(transaction.execute(query).scalars())
            if measured:
                self._durations[study] = 1.2 * max(measured)

    def _give_up(self, trial: str, error_class: str, why: str, now: float) -> None:
        """Ends a trial that will never run: cancelled for its budget, failed for what a person must change."""
        state = "cancelled" if error_class == "budget" else "failed"
        with self.ledger.writing() as transaction:
            row = store.trial_row(transaction, trial)
            values = {"state": state, "error": why, "error_class": error_class}
            if row is not None and store.move_trial(transaction, trial, ["queued"], values):
                store.record(transaction, state, why, study=row["study"], trial=trial, at=now)
                store.end_study_if_over(transaction, row["study"], now)


def ask_to_stop(ledger: Ledger, trial: str, wish: str, why: str, now: float) -> None:
    """A starting or running trial checkpoints and ends; `wish` is what becomes of it then."""
    with ledger.writing() as transaction:
        row = store.trial_row(transaction, trial)
        values = {"state": "stopping", "wish": wish}
        if row is not None and store.move_trial(
            transaction, trial, ["starting", "running"], values
        ):
            store.record(transaction, "stopping", why, study=row["study"], trial=trial, at=now)
