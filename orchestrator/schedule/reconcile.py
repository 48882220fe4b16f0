"""The loop that makes the cluster do what the ledger says: observe, record, and let `admission` start what may run.

Each tick reads everything anew, so a service that dies between two lines of it is taken up by the next one. Only the
ledger remembers; what is kept here besides are words for people and measurements that the next tick replaces.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, update

from contract.attempt import (
    NODES_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    Outcome,
    Progress,
    Result,
)
from orchestrator.cluster.jobs import ENDED, Cluster, Job
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import store
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import ATTEMPTS, TRIALS
from orchestrator.schedule.admission import Admission, ask_to_stop
from orchestrator.schedule.attempt_end import Ended, Verdict, judge, suspects
from orchestrator.schedule.decide import duration
from orchestrator.settings import ServiceSettings, service_files

LOG = logging.getLogger("maskray")
DRIVER_LOG = "attempts/{attempt}/driver.log"
_FORCE_AFTER_S = 30.0  # beyond the grace, should Ray not have ended a job that it was asked to stop


class Reconciler:
    """One service's hands. `tracking_uri` is "" until there is a server, or if there shall be none."""

    def __init__(self, ledger: Ledger, settings: ServiceSettings) -> None:
        self.ledger = ledger
        self.settings = settings
        self.nodes: Sequence[Node] = ()
        self.cluster_words = "the cluster is starting"
        self.tracking_uri = ""
        self.session = ""  # of the head that the last tick saw
        self.admission = Admission(ledger, settings)

    # --- one tick ---

    def tick(self, cluster: Cluster, now: float) -> None:
        """Raises UnreachableError if Ray does not answer; another tick does again what this one left undone."""
        self.session = cluster.session()
        jobs = cluster.jobs()
        nodes = cluster.nodes()
        with self.ledger.reading() as transaction:
            attempts = store.live_attempts(transaction)
        for row in attempts:
            try:
                self._follow(cluster, row, jobs.get(row["submission_id"]), now)
            except (
                OSError,
                ValueError,
            ) as error:  # of one trial's storage or files: it must not hold up the others
                LOG.warning(
                    "trial %s: %s; looked at again", row["trial"], " ".join(str(error).split())
                )
        self._end_orphans(cluster, jobs, {row["submission_id"] for row in attempts})
        self.nodes = nodes
        self.cluster_words = "ready"
        self._take_cached(now)
        self.admission.admit(cluster, nodes, self.tracking_uri, now)

    # --- observing ---

    def _follow(self, cluster: Cluster, row: store.Row, job: Job | None, now: float) -> None:
        if job is None and row["state"] == "submitting" and row["trial_state"] != "stopping":
            self.admission.submit(cluster, row["trial"], row["number"], self.tracking_uri)
        elif job is None or job.state in ENDED:
            self._conclude(cluster, row, job, now)
        else:
            if job.state == "RUNNING":
                self._note_progress(row, now)
            if (
                row["study_state"] == "paused" and not row["wish"]
            ):  # it was being started when the pause came
                ask_to_stop(self.ledger, row["trial"], "pause", "its study is paused", now)
            self._stop_if_wished(cluster, row, now)

    def _note_progress(self, row: store.Row, now: float) -> None:
        values: dict[str, Any] = {}
        attempt_values: dict[str, Any] = {}
        seen = _record(Progress, service_files(row["folder"]).read_object(PROGRESS_FILE))
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
        with self.ledger.writing() as transaction:
            if attempt_values:
                self._set_attempt(transaction, row, attempt_values)
            if values:
                store.move_trial(
                    transaction,
                    row["trial"],
                    ["starting", "running", "stopping"],
                    values,
                    row["number"],
                )
            if row["state"] != "running" and store.move_trial(
                transaction, row["trial"], ["starting"], {"state": "running"}, row["number"]
            ):
                self._record(transaction, row, "running", "its driver runs", now)

    def _watch_for_stall(self, row: store.Row, now: float) -> None:
        still = now - row["moved_at"]
        if row["wish"] or still < self.settings.limits.stall_s:
            return
        with self.ledger.writing() as transaction:
            values = {"state": "stopping", "wish": "stall"}
            if store.move_trial(
                transaction, row["trial"], ["starting", "running"], values, row["number"]
            ):
                self._record(
                    transaction,
                    row,
                    "stalled",
                    f"no step for {duration(still)}: it is started again",
                    now,
                )

    def _stop_if_wished(self, cluster: Cluster, row: store.Row, now: float) -> None:
        if row["trial_state"] != "stopping":
            return
        asked = row["stop_asked_at"]
        if asked and now - asked < self.settings.grace_s + _FORCE_AFTER_S:
            return
        cluster.stop(row["submission_id"])
        with self.ledger.writing() as transaction:
            self._set_attempt(transaction, row, {"stop_asked_at": now})

    def _end_orphans(self, cluster: Cluster, jobs: Mapping[str, Job], known: set[str]) -> None:
        """Jobs of ours that the ledger holds for over: a start that was fenced, a trial that was forgotten."""
        for submission, job in jobs.items():
            if submission in known or job.metadata.get("maskray") != self.admission.mark:
                continue
            if job.state in ENDED:
                cluster.forget(submission)
                continue
            with self.ledger.reading() as transaction:
                query = select(ATTEMPTS.c.state).where(ATTEMPTS.c.submission_id == submission)
                state = transaction.execute(query).scalar()
            if state not in store.LIVE_ATTEMPTS:  # it may have been started since `known` was read
                LOG.warning("ending orphaned job %s", submission)
                cluster.stop(submission)
                with self.ledger.writing() as transaction:
                    trial = job.metadata.get("trial", "")
                    text = f"job {submission} runs, the ledger says it is over: ended"
                    store.record(
                        transaction, "orphan", text, study=trial.rpartition("-")[0], trial=trial
                    )

    # --- the end of an attempt ---

    def _conclude(self, cluster: Cluster, row: store.Row, job: Job | None, now: float) -> None:
        files, number = service_files(row["folder"]), row["number"]
        outcome = _record(Outcome, files.read_object(OUTCOME_FILE.format(attempt=number)))
        result = _record(Result, files.read_object(RESULT_FILE))
        if result is not None and result.attempt != number:
            result = None
        self._note_progress({**row, "state": "running"}, now)
        with self.ledger.reading() as transaction:
            trial = store.trial_row(transaction, row["trial"])
        if trial is None:
            return
        step = max(
            outcome.step if outcome else 0,
            trial["progress"].get("step", 0) if _of(trial, number) else 0,
        )
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
        if (
            self._write_verdict(row, verdict, result, outcome, step, now, trial["wish"])
            and job is not None
        ):
            cluster.forget(row["submission_id"])

    def _write_verdict(
        self,
        row: store.Row,
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
                "metrics": {
                    name: value for name, value in result.metrics.items() if value is not None
                },
                "mlflow_run_id": result.mlflow_run_id,
            }
        marks = (
            result.events if result is not None else outcome.events if outcome is not None else []
        )
        if marks:
            values["marks"] = [mark.model_dump() for mark in marks]
        with self.ledger.writing() as transaction:
            states = ["starting", "running", "stopping"]
            if not store.move_trial(transaction, row["trial"], states, values, row["number"], wish):
                return False
            self._set_attempt(
                transaction,
                row,
                {"state": verdict.attempt, "cause": verdict.cause, "ended_at": now, "step": step},
            )
            kind = (
                "retry"
                if verdict.state == "queued" and verdict.attempt != "stopped"
                else verdict.state
            )
            cause = (
                f"{verdict.cause}: {verdict.error}" if verdict.state == "failed" else verdict.cause
            )
            self._record(transaction, row, kind, cause, now)
            store.end_study_if_over(transaction, row["study"], now)
        LOG.info(
            "trial %s attempt %d: %s, %s", row["trial"], row["number"], verdict.state, verdict.cause
        )
        return True

    def _nodes_of(self, row: store.Row) -> list[str]:
        """The nodes of an attempt's ranks, as its rank 0 wrote them down; nothing if it did not come to that."""
        data = service_files(row["folder"]).read_part(NODES_FILE.format(attempt=row["number"]))
        try:
            found = json.loads(data or b"[]")
        except ValueError:
            return []
        return [str(node) for node in found] if isinstance(found, list) else []

    def _keep_log(self, cluster: Cluster, row: store.Row) -> None:
        text = cluster.log(row["submission_id"])
        path = DRIVER_LOG.format(attempt=row["number"])
        service_files(row["folder"]).write(path, text.encode())

    # --- the ledger ---

    def _take_cached(self, now: float) -> None:
        """Ends waiting trials whose run has been done meanwhile, by another study or in another place of this one."""
        with self.ledger.reading() as transaction:
            waiting = store.waiting_for_nothing(transaction)
            found = store.finished_by_identity(
                transaction, sorted({row["identity"] for row in waiting})
            )
        for row in waiting:
            source = found[row["identity"]]
            with self.ledger.writing() as transaction:
                if store.move_trial(
                    transaction, row["id"], ["queued"], store.cached_values(source)
                ):
                    text = f"taken from trial {source['id']}"
                    store.record(
                        transaction, "cached", text, study=row["study"], trial=row["id"], at=now
                    )
                    store.end_study_if_over(transaction, row["study"], now)

    def _set_attempt(
        self, transaction: Transaction, row: store.Row, values: Mapping[str, Any]
    ) -> None:
        where = (ATTEMPTS.c.trial == row["trial"], ATTEMPTS.c.number == row["number"])
        transaction.execute(update(ATTEMPTS).where(*where).values(**values))

    def _record(
        self, transaction: Transaction, row: store.Row, kind: str, cause: str, now: float
    ) -> None:
        store.record(
            transaction,
            kind,
            cause,
            study=row["study"],
            trial=row["trial"],
            attempt=row["number"],
            at=now,
        )


def _of(trial: store.Row, number: int) -> bool:
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
