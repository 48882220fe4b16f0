"""The loop that makes the cluster do what the ledger says: observe, record, decide, act.

Each tick reads everything anew, so a service that dies between two lines of it is taken up by the next one. Only the
ledger remembers; what is kept here besides are words for people and measurements that the next tick replaces.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, select, update

from orchestrator import ledger, storage
from orchestrator.capacity import Bundle, request_entry, request_id, wanted
from orchestrator.cluster import ENDED, Cluster, Job
from orchestrator.config import Resources, ServiceSettings
from orchestrator.decide import (
    ELSEWHERE,
    UNKNOWN,
    Gang,
    GiveUp,
    Node,
    Running,
    Situation,
    Start,
    Stop,
    Wait,
    Waiting,
    decide,
    duration,
    fit,
    needs,
    take,
)
from orchestrator.places import code_uri
from orchestrator.spec import gang_of, run_spec, study_limits
from orchestrator.tables import ATTEMPTS, TRIALS
from orchestrator.verdict import Ended, Verdict, judge, suspects
from workers.config import NODES_FILE, OUTCOME_FILE, PROGRESS_FILE, RESULT_FILE, SPEC_FILE, Outcome, Progress, Result

LOG = logging.getLogger("maskray")
DRIVER_LOG = "attempts/{attempt}/driver.log"
_FREE = Wait("", 0, "")
_FORCE_AFTER_S = 30.0  # beyond the grace, should Ray not have ended a job that it was asked to stop


class Reconciler:
    """One service's hands. `tracking_uri` is "" until there is a server, or if there shall be none."""

    def __init__(self, engine: Engine, settings: ServiceSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.nodes: Sequence[Node] = ()
        self.waits: dict[str, Wait] = {}
        self.cluster_words = "the cluster is starting"
        self.tracking_uri = ""
        self.session = ""  # of the head that the last tick saw
        self._ledger_id = ledger.ledger_id(engine)
        self._asked: list[Bundle] | None = None
        self._gangs: dict[str, Gang] = {}  # by study
        self._known_code: set[str] = set()
        self._sound: dict[str, str] = {}  # study -> what is wrong with its resources
        self._durations: dict[str, float] = {}  # seconds that a trial of this study took, at most

    # --- one tick ---

    def tick(self, cluster: Cluster, now: float) -> None:
        """Raises UnreachableError if Ray does not answer; another tick does again what this one left undone."""
        self.session = cluster.session()
        jobs = cluster.jobs()
        nodes = cluster.nodes()
        with ledger.reading(self.engine) as connection:
            attempts = ledger.live_attempts(connection)
        for row in attempts:
            try:
                self._follow(cluster, row, jobs.get(row["submission_id"]), now)
            except (OSError, ValueError) as error:  # of one trial's storage or files: it must not hold up the others
                LOG.warning("trial %s: %s; looked at again", row["trial"], " ".join(str(error).split()))
        self._end_orphans(cluster, jobs, {row["submission_id"] for row in attempts})
        self.nodes = nodes
        self.cluster_words = "ready"
        self._take_cached(now)
        self._admit(cluster, now)

    # --- observing ---

    def _follow(self, cluster: Cluster, row: ledger.Row, job: Job | None, now: float) -> None:
        if job is None and row["state"] == "submitting" and row["trial_state"] != "stopping":
            self._submit(cluster, row["trial"], row["number"])
        elif job is None or job.state in ENDED:
            self._conclude(cluster, row, job, now)
        else:
            if job.state == "RUNNING":
                self._note_progress(row, now)
            if row["study_state"] == "paused" and not row["wish"]:  # it was being started when the pause came
                self._wish(row["trial"], "pause", "its study is paused", now)
            self._stop_if_wished(cluster, row, now)

    def _note_progress(self, row: ledger.Row, now: float) -> None:
        values: dict[str, Any] = {}
        attempt_values: dict[str, Any] = {}
        seen = _record(Progress, storage.read_json(storage.join(row["folder"], PROGRESS_FILE)))
        if seen is not None and seen.attempt == row["number"]:
            before = row["progress"]
            if seen.model_dump() != before:
                values["progress"] = seen.model_dump()
            place = (seen.attempt, seen.phase, seen.step)
            if place != (before.get("attempt"), before.get("phase"), before.get("step")):
                values["moved_at"] = now
                attempt_values["step"] = seen.step
            if row["first_step"] < 0:
                attempt_values["first_step"] = seen.step
        if row["state"] != "running":
            attempt_values |= {"state": "running", "running_at": now}
            values.setdefault("moved_at", now)
        if not values and not attempt_values:
            self._watch_for_stall(row, now)
            return
        with self.engine.begin() as connection:
            if attempt_values:
                self._set_attempt(connection, row, attempt_values)
            if values:
                ledger.move_trial(connection, row["trial"], ["starting", "running", "stopping"], values, row["number"])
            if row["state"] != "running" and ledger.move_trial(
                connection, row["trial"], ["starting"], {"state": "running"}, row["number"]
            ):
                self._record(connection, row, "running", "its driver runs", now)

    def _watch_for_stall(self, row: ledger.Row, now: float) -> None:
        still = now - row["moved_at"]
        if row["wish"] or still < self.settings.limits.stall_s:
            return
        with self.engine.begin() as connection:
            values = {"state": "stopping", "wish": "stall"}
            if ledger.move_trial(connection, row["trial"], ["starting", "running"], values, row["number"]):
                self._record(connection, row, "stalled", f"no step for {duration(still)}: it is started again", now)

    def _stop_if_wished(self, cluster: Cluster, row: ledger.Row, now: float) -> None:
        if row["trial_state"] != "stopping":
            return
        asked = row["stop_asked_at"]
        if asked and now - asked < self.settings.grace_s + _FORCE_AFTER_S:
            return
        cluster.stop(row["submission_id"])
        with self.engine.begin() as connection:
            self._set_attempt(connection, row, {"stop_asked_at": now})

    def _end_orphans(self, cluster: Cluster, jobs: Mapping[str, Job], known: set[str]) -> None:
        """Jobs of ours that the ledger holds for over: a start that was fenced, a trial that was forgotten."""
        for submission, job in jobs.items():
            if submission in known or job.metadata.get("maskray") != self._mark():
                continue
            if job.state in ENDED:
                cluster.forget(submission)
                continue
            with ledger.reading(self.engine) as connection:
                query = select(ATTEMPTS.c.state).where(ATTEMPTS.c.submission_id == submission)
                state = connection.execute(query).scalar()
            if state not in ledger.LIVE_ATTEMPTS:  # it may have been started since `known` was read
                LOG.warning("ending orphaned job %s", submission)
                cluster.stop(submission)
                with self.engine.begin() as connection:
                    trial = job.metadata.get("trial", "")
                    text = f"job {submission} runs, the ledger says it is over: ended"
                    ledger.record(connection, "orphan", text, study=trial.rpartition("-")[0], trial=trial)

    # --- the end of an attempt ---

    def _conclude(self, cluster: Cluster, row: ledger.Row, job: Job | None, now: float) -> None:
        folder, number = row["folder"], row["number"]
        outcome = _record(Outcome, storage.read_json(storage.join(folder, OUTCOME_FILE.format(attempt=number))))
        result = _record(Result, storage.read_json(storage.join(folder, RESULT_FILE)))
        if result is not None and result.attempt != number:
            result = None
        self._note_progress({**row, "state": "running"}, now)
        with ledger.reading(self.engine) as connection:
            trial = ledger.trial_row(connection, row["trial"])
        if trial is None:
            return
        step = max(outcome.step if outcome else 0, trial["progress"].get("step", 0) if _of(trial, number) else 0)
        verdict = judge(
            Ended(
                outcome=outcome,
                has_result=result is not None,
                exit_code=job.exit_code if job else None,
                message=job.message if job else "Ray no longer knows its job",
                wish=trial["wish"],
                step=step,
                best_step=row["best_step"],
                failures=row["failures"],
                lost=row["lost"],
                last_error=row["error"],
                max_attempts=row["spec"]["max_attempts"],
            ),
            self.settings.limits,
        )
        if job is not None:
            self._keep_log(cluster, row)
        # a wish that came meanwhile was not judged: the next tick does
        if self._write_verdict(row, verdict, result, outcome, step, now, trial["wish"]) and job is not None:
            cluster.forget(row["submission_id"])

    def _write_verdict(
        self,
        row: ledger.Row,
        verdict: Verdict,
        result: Result | None,
        outcome: Outcome | None,
        step: int,
        now: float,
        wish: str,
    ) -> bool:
        ranks = row["spec"]["resources"]["ranks"]
        preempted = outcome is not None and outcome.state == "preempted"
        seconds = now - (row["running_at"] or now)
        values: dict[str, Any] = {
            "state": verdict.state,
            "error": verdict.error,
            "error_class": "" if verdict.error_class == "none" else verdict.error_class,
            "failures": verdict.failures,
            "lost": verdict.lost,
            "best_step": max(step, row["best_step"]),
            "not_before": now + verdict.delay_s,
            "wish": "",
            "rank_seconds": TRIALS.c.rank_seconds + ranks * seconds,
            "suspects": " ".join(suspects(verdict, self._nodes_of(row), preempted)),
        }
        if result is not None:
            values |= {
                "metrics": {name: value for name, value in result.metrics.items() if value is not None},
                "mlflow_run_id": result.mlflow_run_id,
            }
        marks = result.events if result is not None else outcome.events if outcome is not None else []
        if marks:
            values["marks"] = [mark.model_dump() for mark in marks]
        with self.engine.begin() as connection:
            states = ["starting", "running", "stopping"]
            if not ledger.move_trial(connection, row["trial"], states, values, row["number"], wish):
                return False
            self._set_attempt(
                connection, row, {"state": verdict.attempt, "cause": verdict.cause, "ended_at": now, "step": step}
            )
            kind = "retry" if verdict.state == "queued" and verdict.attempt != "stopped" else verdict.state
            cause = f"{verdict.cause}: {verdict.error}" if verdict.state == "failed" else verdict.cause
            self._record(connection, row, kind, cause, now)
            ledger.end_study_if_over(connection, row["study"], now)
        LOG.info("trial %s attempt %d: %s, %s", row["trial"], row["number"], verdict.state, verdict.cause)
        return True

    def _nodes_of(self, row: ledger.Row) -> list[str]:
        """The nodes of an attempt's ranks, as its rank 0 wrote them down; nothing if it did not come to that."""
        data = storage.read_bytes(storage.join(row["folder"], NODES_FILE.format(attempt=row["number"])))
        try:
            found = json.loads(data or b"[]")
        except ValueError:
            return []
        return [str(node) for node in found] if isinstance(found, list) else []

    def _keep_log(self, cluster: Cluster, row: ledger.Row) -> None:
        text = cluster.log(row["submission_id"])
        path = storage.join(row["folder"], DRIVER_LOG.format(attempt=row["number"]))
        storage.write_bytes(path, text.encode())

    # --- starting ---

    def _admit(self, cluster: Cluster, now: float) -> None:
        with ledger.reading(self.engine) as connection:
            attempts = ledger.live_attempts(connection)
            waiting = ledger.waiting_trials(connection)
            studies = study_limits(connection, attempts, now)
            self._measure_durations(connection, {row["study"] for row in waiting})
        held, free = self._hold_back(waiting, attempts, now)
        situation = Situation(
            nodes=self.nodes,
            waiting=[self._waiting(row, now) for row in free],
            running=self._running(attempts),
            studies=studies,
        )
        decisions = decide(situation, self.settings.limits)
        waits = {wait.trial: wait for wait in held}
        for decision in decisions:
            match decision:
                case Start():
                    number = ledger.start_attempt(self.engine, decision.trial, now, decision.why, decision.avoid)
                    if number:
                        self._submit(cluster, decision.trial, number)
                case Stop():
                    self._wish(decision.trial, "budget", decision.why, now)
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
        self, cluster: Cluster, attempts: Sequence[ledger.Row], head: ledger.Row | None, now: float
    ) -> None:
        """Sends a request when it differs from the last one; a service that was started anew sends it again."""
        gangs = [self._gang(row) for row in attempts]
        bundles = wanted(gangs, self._gang(head) if head is not None else None, self.settings.node_shapes)
        if bundles == self._asked or (not bundles and self._asked is None):
            return
        entry = f"exec {shlex.join(request_entry(bundles, self.settings.entry[0]))}"
        cluster.submit(request_id(self._mark(), bundles, now), entry, {}, "", {})
        self._asked = bundles
        LOG.info("asked the cluster for %d bundles", len(bundles))

    def _submit(self, cluster: Cluster, trial: str, number: int) -> None:
        """Writes the attempt's spec and starts its job. Doing it twice does it once: the submission id is the fence."""
        with ledger.reading(self.engine) as connection:
            row = ledger.trial_row(connection, trial)
            study = ledger.study_row(connection, row["study"]) if row is not None else None
            avoid = connection.execute(
                select(ATTEMPTS.c.avoid).where(ATTEMPTS.c.trial == trial, ATTEMPTS.c.number == number)
            ).scalar()
        if row is None or study is None:
            return
        spec = run_spec(row, study, number, (avoid or "").split(), self.tracking_uri, self.settings.grace_s)
        path = storage.join(row["folder"], SPEC_FILE.format(attempt=number))
        storage.write_bytes(path, json.dumps(spec, indent=1).encode())
        package = ""
        if study["code"]:
            package = f"_ray_pkg_{study['code'][:32]}.zip"
            cluster.upload(package, lambda: self._read_code(study["code"]))
        environment = {
            **self.settings.environment,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": f"{self.settings.grace_s + 15:.0f}",
        }
        entry = f"exec {shlex.join([*self.settings.entry, '--spec', path])}"
        submission = f"{trial}-{number}"
        cluster.submit(submission, entry, environment, package, {"maskray": self._mark(), "trial": trial})
        with self.engine.begin() as connection:
            connection.execute(
                update(ATTEMPTS)
                .where(ATTEMPTS.c.submission_id == submission, ATTEMPTS.c.state == "submitting")
                .values(state="submitted")
            )

    # --- what decide needs to know ---

    def _gang(self, row: ledger.Row) -> Gang:
        """One object for all trials of a study, whose spec never changes."""
        if row["study"] not in self._gangs:
            self._gangs[row["study"]] = gang_of(row["spec"])
        return self._gangs[row["study"]]

    def _waiting(self, row: ledger.Row, now: float) -> Waiting:
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

    def _running(self, attempts: Sequence[ledger.Row]) -> list[Running]:
        """A gang whose ranks have said something sits somewhere: its nodes' free resources lack it already.

        Ray does not say over HTTP where, so it is put where that much is in use.
        """
        used = {
            node.id: {name: node.total[name] - node.free.get(name, 0.0) for name in node.total} for node in self.nodes
        }
        found = []
        for row in attempts:
            seated = row["state"] == "running" and row["progress"].get("attempt") == row["number"]
            left = row["progress"].get("seconds_left") if seated else None
            gang = self._gang(row)
            placement = (fit(gang, used) or {ELSEWHERE: gang.ranks}) if seated else {}
            take(used, gang, placement)
            seconds = UNKNOWN if left is None else float(left)
            found.append(Running(row["trial"], row["study"], row["owner"], gang, placement, seconds))
        return found

    def _hold_back(
        self, waiting: Sequence[ledger.Row], attempts: Sequence[ledger.Row], now: float
    ) -> tuple[list[Wait], list[ledger.Row]]:
        """Trials that wait for something that decide does not know, and the others."""
        held: list[Wait] = []
        free: list[ledger.Row] = []
        under_way = self._identities([row["trial"] for row in attempts])
        first: dict[str, str] = {}  # identity -> the trial of it that waits in front
        for row in sorted(waiting, key=lambda row: (-row["priority"], row["queued_at"])):
            if problem := self._unsound(row):
                self._give_up(row["id"], "person", problem, now)
            elif row["code"] and not self._has_code(row["code"]):
                held.append(Wait(row["id"], 0, "its code package is missing: submit the study's code again"))
            elif self.settings.ray == "local" and not self._holdable(row):
                self._give_up(
                    row["id"], "person", f"needs {needs(gang_of(row['spec']))}: more than this machine has", now
                )
            elif self._awaits_parent(row, now):
                held.append(Wait(row["id"], 0, "waits for the MLflow server"))
            elif not row["fresh"] and row["identity"] in under_way:
                held.append(Wait(row["id"], 0, f"is the same run as trial {under_way[row['identity']]}, under way"))
            elif not row["fresh"] and row["identity"] in first:
                held.append(Wait(row["id"], 0, f"is the same run as trial {first[row['identity']]}, which waits first"))
            else:
                free.append(row)
                if not row["fresh"]:
                    first[row["identity"]] = row["id"]
        place = {row["id"]: index for index, row in enumerate(waiting)}
        return held, sorted(free, key=lambda row: place[row["id"]])

    def _unsound(self, row: ledger.Row) -> str:
        """What is wrong with a study's resources, from a ledger that an older version filled; it must stop no other."""
        if row["study"] not in self._sound:
            try:
                Resources.model_validate(row["spec"]["resources"])
                self._sound[row["study"]] = ""
            except ValidationError as error:
                found = error.errors(include_url=False)[0]
                self._sound[row["study"]] = f"resources.{'.'.join(map(str, found['loc']))}: {found['msg']}"
        return self._sound[row["study"]]

    def _has_code(self, sha256: str) -> bool:
        if sha256 not in self._known_code and storage.exists(code_uri(self.settings, sha256)):
            self._known_code.add(sha256)
        return sha256 in self._known_code

    def _read_code(self, sha256: str) -> bytes:
        data = storage.read_bytes(code_uri(self.settings, sha256))
        if data is None:
            self._known_code.discard(sha256)
            raise FileNotFoundError(
                f"code package {sha256[:12]} is gone from the storage; submit the study's code again"
            )
        return data

    def _holdable(self, row: ledger.Row) -> bool:
        return not self.nodes or fit(self._gang(row), {node.id: node.total for node in self.nodes}) is not None

    def _awaits_parent(self, row: ledger.Row, now: float) -> bool:
        wanted = self.settings.mlflow != "" and not row["mlflow_run_id"]
        return wanted and now - row["created_at"] < self.settings.mlflow_wait_s

    def _identities(self, trials: Sequence[str]) -> dict[str, str]:
        with ledger.reading(self.engine) as connection:
            query = select(TRIALS.c.identity, TRIALS.c.id).where(TRIALS.c.id.in_(trials))
            return dict(connection.execute(query).all())

    def _measure_durations(self, connection: Connection, studies: set[str]) -> None:
        for study in studies:
            query = (
                select(ATTEMPTS.c.ended_at - ATTEMPTS.c.started_at)
                .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
                .where(TRIALS.c.study == study, ATTEMPTS.c.state == "done")
            )
            measured = list(connection.execute(query).scalars())
            if measured:
                self._durations[study] = 1.2 * max(measured)

    # --- the ledger ---

    def _take_cached(self, now: float) -> None:
        """Ends waiting trials whose run has been done meanwhile, by another study or in another place of this one."""
        with ledger.reading(self.engine) as connection:
            waiting = ledger.waiting_for_nothing(connection)
            found = ledger.finished_by_identity(connection, sorted({row["identity"] for row in waiting}))
        for row in waiting:
            source = found[row["identity"]]
            with self.engine.begin() as connection:
                if ledger.move_trial(connection, row["id"], ["queued"], ledger.cached_values(source)):
                    text = f"taken from trial {source['id']}"
                    ledger.record(connection, "cached", text, study=row["study"], trial=row["id"], at=now)
                    ledger.end_study_if_over(connection, row["study"], now)

    def _wish(self, trial: str, wish: str, why: str, now: float) -> None:
        with self.engine.begin() as connection:
            row = ledger.trial_row(connection, trial)
            values = {"state": "stopping", "wish": wish}
            if row is not None and ledger.move_trial(connection, trial, ["starting", "running"], values):
                ledger.record(connection, "stopping", why, study=row["study"], trial=trial, at=now)

    def _give_up(self, trial: str, error_class: str, why: str, now: float) -> None:
        """Ends a trial that will never run: cancelled for its budget, failed for what a person must change."""
        state = "cancelled" if error_class == "budget" else "failed"
        with self.engine.begin() as connection:
            row = ledger.trial_row(connection, trial)
            values = {"state": state, "error": why, "error_class": error_class}
            if row is not None and ledger.move_trial(connection, trial, ["queued"], values):
                ledger.record(connection, state, why, study=row["study"], trial=trial, at=now)
                ledger.end_study_if_over(connection, row["study"], now)

    def _set_attempt(self, connection: Connection, row: ledger.Row, values: Mapping[str, Any]) -> None:
        where = (ATTEMPTS.c.trial == row["trial"], ATTEMPTS.c.number == row["number"])
        connection.execute(update(ATTEMPTS).where(*where).values(**values))

    def _record(self, connection: Connection, row: ledger.Row, kind: str, cause: str, now: float) -> None:
        ledger.record(connection, kind, cause, study=row["study"], trial=row["trial"], attempt=row["number"], at=now)

    def _mark(self) -> str:
        """Tells this service's jobs from those of others on the same cluster."""
        return self._ledger_id


def _of(trial: ledger.Row, number: int) -> bool:
    return bool(trial["progress"].get("attempt") == number)


def _record(record: type[Any], data: Any) -> Any:
    """A file of the trial's folder as a record; None if there is none or it is not one (a study's code may differ)."""
    if data is None:
        return None
    try:
        return record.model_validate(data)
    except ValueError as error:
        LOG.warning("%s: %s", record.__name__, " ".join(str(error).split())[:300])
        return None
