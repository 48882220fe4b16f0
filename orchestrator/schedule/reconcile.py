"""The loop that makes the cluster do what the ledger says: it observes, records and starts.

Each tick reads everything anew. So when a service dies between two lines of a tick, the next
service goes on from the ledger. The rest that is kept here is words for people and measurements,
and the next tick replaces them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel

from contract.attempt import (
    DRIVER_LOG,
    LIVE_ATTEMPTS,
    NODES_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    Outcome,
    Progress,
    Result,
)
from contract.words import duration
from orchestrator.cluster.jobs import ENDED, Cluster, Job
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import attempts, queries
from orchestrator.ledger.changes import TrialChange, ask_to_stop, take_finished
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.rows import Json, LiveAttempt
from orchestrator.schedule.admission import Admission
from orchestrator.schedule.attempt_end import EndedAttempt, NextState, after_attempt, suspects
from orchestrator.settings import ServiceSettings, service_files

LOG = logging.getLogger("maskray")
_FORCE_AFTER_S = 30.0  # beyond the grace: then Ray is asked again to end a job

AnyFile = TypeVar("AnyFile", bound=BaseModel)


class Reconciler:
    """The hands of one service. `tracking_uri` is "" until MLflow answers, and without MLflow."""

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
        """Raises UnreachableError if Ray does not answer; the next tick does the rest."""
        self.session = cluster.session()
        jobs = cluster.jobs()
        nodes = cluster.nodes()
        with self.ledger.reading() as transaction:
            live_attempts = queries.live_attempts(transaction)
        for live in live_attempts:
            try:
                self._follow(cluster, live, jobs.get(live.attempt.submission_id), now)
            except (OSError, ValueError) as error:
                # of one trial's storage or files: the other trials must not wait for it
                words = " ".join(str(error).split())
                LOG.warning("trial %s: %s; looked at again", live.trial.id, words)
        self._end_orphans(cluster, jobs, {live.attempt.submission_id for live in live_attempts})
        self.nodes = nodes
        self.cluster_words = "ready"
        take_finished(self.ledger, now)
        self.admission.admit(cluster, nodes, self.tracking_uri, now)

    # --- observing ---

    def _follow(self, cluster: Cluster, live: LiveAttempt, job: Job | None, now: float) -> None:
        submitting = live.attempt.state == "submitting" and live.trial.state != "stopping"
        if job is None and submitting:
            # the service died between the start in the ledger and the job in Ray
            number = live.attempt.number
            self.admission.submit(cluster, live.trial.id, number, self.tracking_uri)
        elif job is None or job.state in ENDED:
            self._conclude(cluster, live, job, now)
        else:
            if job.state == "RUNNING":
                self._note_progress(live, now)
            if live.study.state == "paused" and not live.trial.wish:
                # the pause came while the attempt was being started
                ask_to_stop(self.ledger, live.trial.id, "pause", "its study is paused", now)
            self._stop_if_wished(cluster, live, now)

    def _note_progress(self, live: LiveAttempt, now: float) -> None:
        data = service_files(live.trial.folder).read_object(PROGRESS_FILE)
        seen = _parsed(Progress, data)
        if seen is not None and seen.attempt != live.attempt.number:
            seen = None  # the file of an earlier attempt stays until the new ranks write theirs
        if not attempts.note_progress(self.ledger, live, seen, now):
            self._stop_if_stalled(live, now)

    def _stop_if_stalled(self, live: LiveAttempt, now: float) -> None:
        still = now - live.trial.moved_at
        if live.trial.wish or still < self.settings.limits.stall_s:
            return
        why = f"no step for {duration(still)}: it is started again"
        number = live.attempt.number
        ask_to_stop(
            self.ledger, live.trial.id, "stall", why, now, kind="stalled", at_attempt=number
        )

    def _stop_if_wished(self, cluster: Cluster, live: LiveAttempt, now: float) -> None:
        if live.trial.state != "stopping":
            return
        asked = live.attempt.stop_asked_at
        # Ray ends the job by force after the grace. It is asked again only if it did not.
        if asked and now - asked < self.settings.grace_s + _FORCE_AFTER_S:
            return
        cluster.stop(live.attempt.submission_id)
        attempts.note_stop(self.ledger, live, now)

    def _end_orphans(self, cluster: Cluster, jobs: Mapping[str, Job], known: set[str]) -> None:
        """Ends jobs of ours whose attempt the ledger says is over, or does not know."""
        for submission, job in jobs.items():
            if submission in known or job.metadata.get("maskray") != self.admission.mark:
                continue
            if job.state in ENDED:
                cluster.forget(submission)
                continue
            with self.ledger.reading() as transaction:
                state = queries.attempt_state(transaction, submission)
            if state in LIVE_ATTEMPTS:  # it was started since `known` was read
                continue
            LOG.warning("ending orphaned job %s", submission)
            cluster.stop(submission)
            trial = job.metadata.get("trial", "")
            study = trial.rpartition("-")[0]
            text = f"job {submission} runs, the ledger says it is over: ended"
            with self.ledger.writing() as transaction:
                record(transaction, "orphan", text, study=study, trial=trial)

    # --- the end of an attempt ---

    def _conclude(self, cluster: Cluster, live: LiveAttempt, job: Job | None, now: float) -> None:
        """Reads what the attempt left, and writes down what becomes of its trial."""
        files, number = service_files(live.trial.folder), live.attempt.number
        outcome = _parsed(Outcome, files.read_object(OUTCOME_FILE.format(attempt=number)))
        result = _parsed(Result, files.read_object(RESULT_FILE))
        if result is not None and result.attempt != number:
            result = None  # lost ranks of an earlier attempt may still write theirs
        # Its last progress counts, also where it ended before a tick saw it run.
        self._note_progress(replace(live, attempt=replace(live.attempt, state="running")), now)
        with self.ledger.reading() as transaction:
            trial = queries.trial_row(transaction, live.trial.id)
        if trial is None:
            return
        progress = trial.progress
        step = progress.step if progress is not None and progress.attempt == number else 0
        ended = EndedAttempt(
            outcome=outcome,
            has_result=result is not None,
            exit_code=job.exit_code if job else None,
            message=job.message if job else "Ray no longer knows its job",
            wish=trial.wish,
            step=max(outcome.step if outcome else 0, step),
            best_step=live.trial.best_step,
            failures=live.trial.failures,
            lost=live.trial.lost,
            last_error=live.trial.error,
            max_attempts=live.study.spec.max_attempts,
        )
        if job is not None:
            # before the ledger ends the attempt: a service that dies in between comes back here
            self._keep_log(cluster, live)
        # If another wish came meanwhile, nothing is written, and the next tick decides anew.
        if self._write_end(live, ended, result, now) and job is not None:
            cluster.forget(live.attempt.submission_id)

    def _write_end(
        self, live: LiveAttempt, ended: EndedAttempt, result: Result | None, now: float
    ) -> bool:
        after = after_attempt(ended, self.settings.limits)
        change: TrialChange = {
            "state": after.state,
            "error": after.error,
            "error_class": "" if after.error_class == "none" else after.error_class,
            "failures": after.failures,
            "lost": after.lost,
            "best_step": max(ended.step, ended.best_step),
            "not_before": now + after.delay_s,
            "wish": "",
            "suspects": " ".join(suspects(after, self._nodes_of(live), ended.outcome)),
        }
        if result is not None:
            change["metrics"] = dict(result.metrics)
            change["mlflow_run_id"] = result.mlflow_run_id
        source = result if result is not None else ended.outcome
        if source is not None and source.events:
            change["marks"] = [event.model_dump() for event in source.events]
        written = attempts.end_attempt(
            self.ledger,
            live,
            change,
            {"state": after.attempt, "cause": after.cause, "ended_at": now, "step": ended.step},
            (
                _kind(after),
                f"{after.cause}: {after.error}" if after.state == "failed" else after.cause,
            ),
            now,
            ended.wish,
        )
        if written:
            words = (live.trial.id, live.attempt.number, after.state, after.cause)
            LOG.info("trial %s attempt %d: %s, %s", *words)
        return written

    def _nodes_of(self, live: LiveAttempt) -> list[str]:
        """The nodes of the attempt's ranks, in order; none if its rank 0 wrote none."""
        path = NODES_FILE.format(attempt=live.attempt.number)
        data = service_files(live.trial.folder).read_part(path)
        try:
            nodes = json.loads(data or b"[]")
        except ValueError:
            return []
        return [str(node) for node in nodes] if isinstance(nodes, list) else []

    def _keep_log(self, cluster: Cluster, live: LiveAttempt) -> None:
        """Ray's copy goes when the job is forgotten."""
        text = cluster.log(live.attempt.submission_id)
        path = DRIVER_LOG.format(attempt=live.attempt.number)
        service_files(live.trial.folder).write(path, text.encode())


def _kind(after: NextState) -> str:
    """Of the event. A trial that waits again after a person's pause is no retry."""
    return "retry" if after.state == "queued" and after.attempt != "stopped" else after.state


def _parsed(record: type[AnyFile], data: Json | None) -> AnyFile | None:
    """A file of the trial's folder as a record; None if it is absent or no such record.

    The study's own code wrote it, which may be of another version.
    """
    if data is None:
        return None
    try:
        return record.model_validate(data)
    except ValueError as error:
        LOG.warning("%s: %s", record.__name__, " ".join(str(error).split())[:300])
        return None
