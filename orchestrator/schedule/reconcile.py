"""The loop that makes the cluster do what the ledger says: it observes, records and starts.

Each tick reads everything anew. So when a service dies between two lines of a tick, the next
service goes on from the ledger. The rest that is kept here is words for people and measurements,
and the next tick replaces them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, RootModel

from contract.attempt import (
    DRIVER_LOG,
    LIVE_ATTEMPTS,
    NODES_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    Event,
    Outcome,
    Progress,
    Result,
)
from contract.words import duration, printable
from orchestrator.cluster.jobs import ENDED, Cluster, Job, UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import attempts, backup, queries
from orchestrator.ledger.changes import TrialChange, ask_to_stop, take_finished
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger, LedgerError, is_down
from orchestrator.ledger.rows import LiveAttempt
from orchestrator.ledger.sweep import mend
from orchestrator.schedule.admission import Admission
from orchestrator.schedule.attempt_end import EndedAttempt, NextState, after_attempt, suspects
from orchestrator.schedule.measures import Measures
from orchestrator.schedule.trouble import Troubles
from orchestrator.settings import ServiceSettings
from orchestrator.trial_folder import (
    ANSWER_BYTES,
    SMALL_BYTES,
    OtherFormError,
    TrialFileError,
    TrialFolder,
)

LOG = logging.getLogger("maskray")
_FORCE_AFTER_S = 30.0  # beyond the grace: then Ray is asked again to end a job
_SWEEP_S = 60.0  # between two looks for rows that contradict each other
_MAX_MARKS = 1000  # events that the ledger keeps of a trial
_MAX_ERROR = 2000  # characters
_TRIAL = re.compile(r"[\w.-]{1,100}-[0-9]{3,8}", re.ASCII)  # the ledger holds no longer name


class _Nodes(RootModel[list[Annotated[str, Field(pattern=r"^[\w.:-]{1,200}$")]]]):
    """`nodes.json`: the ledger keeps the names in one text, separated by blanks."""


@dataclass(frozen=True)
class _Left:
    """What an attempt left in its folder. unsound: what of it cannot be believed, in words."""

    outcome: Outcome | None = None
    result: Result | None = None
    nodes: Sequence[str] = ()
    unsound: str = ""


class Reconciler:
    """The hands of one service.

    tracking_uri: "" without MLflow, and until the address of a local one is known.
    """

    def __init__(self, ledger: Ledger, settings: ServiceSettings) -> None:
        self.ledger = ledger
        self.settings = settings
        self.nodes: Sequence[Node] = ()
        self.cluster_words = "the cluster is starting"
        self.tracking_uri = ""
        self.session = ""  # of the head that the last tick saw
        self.troubles = Troubles()
        self._swept = -_SWEEP_S
        self.admission = Admission(ledger, settings, self.troubles)
        self.measures = Measures()

    # --- one tick ---

    def tick(self, cluster: Cluster, now: float) -> None:
        """Raises UnreachableError if Ray does not answer; the next tick does the rest."""
        with self.measures.ray.time():
            self.session = cluster.session()
        if now - self._swept >= _SWEEP_S:
            self._swept = now
            if mended := mend(self.ledger, now):
                LOG.warning("mended %d studies; the events named mended say what", mended)
        with self.measures.ray.time():
            jobs = cluster.jobs()
            nodes = cluster.nodes()
        self._settle(jobs, now)
        with self.ledger.reading() as transaction:
            live_attempts = queries.live_attempts(transaction)
        self.troubles.keep({live.trial.id for live in live_attempts})
        for live in live_attempts:
            with self.troubles.apart(live.trial.id):
                self._follow(cluster, live, jobs.get(live.attempt.submission_id), now)
        self._end_orphans(cluster, jobs, {live.attempt.submission_id for live in live_attempts})
        self.nodes = nodes
        self.cluster_words = "ready"
        take_finished(self.ledger, now)
        with self.measures.decisions.time():
            self.admission.admit(cluster, nodes, self.tracking_uri, now)

    def _settle(self, jobs: Mapping[str, Job], now: float) -> None:
        """After a restore: a job that is the next attempt of a waiting trial is adopted.

        All others that the ledger does not know are ended as orphans. At other times no job is
        adopted: a trial can start jobs of any name.
        """
        with self.ledger.reading() as transaction:
            if not backup.unsettled(transaction):
                return
        ours = [job for job in jobs.values() if job.metadata.get("maskray") == self.admission.mark]
        adopted = []
        for job in ours:
            trial = _trial_of(job)
            with self.troubles.apart(job.submission_id):
                if job.state not in ENDED and attempts.adopt_attempt(
                    self.ledger, trial, job.submission_id, now
                ):
                    adopted.append(job.submission_id)
        words = f"adopted {len(adopted)} of {len(ours)} jobs{''.join(f', {x}' for x in adopted)}"
        LOG.info("restored ledger: %s", words)
        backup.settle(self.ledger, words, now)

    # --- observing ---

    def _follow(self, cluster: Cluster, live: LiveAttempt, job: Job | None, now: float) -> None:
        submitting = live.attempt.state == "submitting" and live.trial.state != "stopping"
        if job is None and submitting:
            # the service died between the start in the ledger and the job in Ray
            number = live.attempt.number
            try:
                self.admission.submit(cluster, live.trial.id, number, self.tracking_uri)
            except TrialFileError as error:
                self._conclude(cluster, live, None, now, str(error))
        elif job is None or job.state in ENDED:
            self._end(cluster, live, job, now)
        else:
            if job.state == "RUNNING":
                self._note_progress(live, now)
            if live.study.state == "paused" and not live.trial.wish:
                # the pause came while the attempt was being started
                ask_to_stop(self.ledger, live.trial.id, "pause", "its study is paused", now)
            self._stop_if_wished(cluster, live, now)

    def _note_progress(self, live: LiveAttempt, now: float) -> str:
        """What in `progress.json` cannot be believed, in words; empty if nothing."""
        seen, unsound = None, ""
        try:
            seen = TrialFolder(live.trial.folder).record(Progress, PROGRESS_FILE, SMALL_BYTES)
        except OtherFormError as error:  # of another version, or half of it: the next one counts
            self.troubles.note(live.trial.id, str(error))
        except TrialFileError as error:
            unsound = str(error)
            self.troubles.note(live.trial.id, unsound)
        if seen is not None and seen.attempt != live.attempt.number:
            seen = None  # the file of an earlier attempt stays until the new ranks write theirs
        if not attempts.note_progress(self.ledger, live, seen, now):
            self._stop_if_stalled(live, now)
        return unsound

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
            if submission not in known and job.metadata.get("maskray") == self.admission.mark:
                # by the job: a live trial's own trouble stays
                with self.troubles.apart(submission):
                    self._end_orphan(cluster, job)

    def _end_orphan(self, cluster: Cluster, job: Job) -> None:
        submission = job.submission_id
        if job.state in ENDED:
            cluster.forget(submission)
            return
        with self.ledger.reading() as transaction:
            state = queries.attempt_state(transaction, submission)
        if state in LIVE_ATTEMPTS:  # it was started since the live ones were read
            return
        LOG.warning("ending orphaned job %s", printable(submission))
        cluster.stop(submission)
        trial = _trial_of(job)
        text = printable(f"job {submission} runs, the ledger says it is over: ended")
        with self.ledger.writing() as transaction:
            study = trial.rpartition("-")[0]
            record(transaction, "orphan", text, study=study, trial=trial)

    # --- the end of an attempt ---

    def _end(self, cluster: Cluster, live: LiveAttempt, job: Job | None, now: float) -> None:
        try:
            self._conclude(cluster, live, job, now)
        except (UnreachableError, OSError):
            raise
        except Exception as error:
            if isinstance(error, LedgerError) and is_down(error):
                raise
            # What it left breaks something that nobody foresaw. The next turn would meet it again.
            LOG.exception("trial %s: the end of attempt %d", live.trial.id, live.attempt.number)
            words = f"the service cannot take what it left ({type(error).__name__}: {error})"
            self._conclude(cluster, live, job, now, printable(" ".join(words.split()))[:_MAX_ERROR])

    def _conclude(
        self, cluster: Cluster, live: LiveAttempt, job: Job | None, now: float, unsound: str = ""
    ) -> None:
        """Reads what the attempt left, and writes down what becomes of its trial."""
        number = live.attempt.number
        left = _Left(unsound=unsound) if unsound else self._left(cluster, live, job)
        # Its last progress counts, also where it ended before a tick saw it run.
        running = replace(live, attempt=replace(live.attempt, state="running"))
        unsound = left.unsound or self._note_progress(running, now)
        with self.ledger.reading() as transaction:
            trial = queries.trial_row(transaction, live.trial.id)
        if trial is None:
            return
        progress = trial.progress
        step = progress.step if progress is not None and progress.attempt == number else 0
        ended = EndedAttempt(
            outcome=left.outcome,
            # A trial that is done lends its numbers: without sound ones it is not done.
            has_result=left.result is not None and not unsound,
            exit_code=job.exit_code if job else None,
            message=job.message if job else "Ray no longer knows its job",
            wish=trial.wish,
            step=max(left.outcome.step if left.outcome else 0, step),
            best_step=live.trial.best_step,
            failures=live.trial.failures,
            lost=live.trial.lost,
            last_error=live.trial.error,
            max_attempts=live.study.spec.max_attempts,
            unsound=unsound,
        )
        # If another wish came meanwhile, nothing is written, and the next tick decides anew.
        if self._write_end(live, ended, left, now) and job is not None:
            cluster.forget(live.attempt.submission_id)

    def _left(self, cluster: Cluster, live: LiveAttempt, job: Job | None) -> _Left:
        folder, number = TrialFolder(live.trial.folder), live.attempt.number
        outcome, result, nodes = None, None, _Nodes([])
        try:
            if job is not None:
                # Ray's copy goes when the job is forgotten. Before the ledger ends the attempt: a
                # service that dies in between comes back here.
                log = cluster.log(live.attempt.submission_id)
                folder.write(DRIVER_LOG.format(attempt=number), log.encode(errors="replace"))
            path = OUTCOME_FILE.format(attempt=number)
            outcome = folder.record(Outcome, path, ANSWER_BYTES)
            result = folder.record(Result, RESULT_FILE, ANSWER_BYTES)
            path = NODES_FILE.format(attempt=number)
            nodes = folder.record(_Nodes, path, ANSWER_BYTES) or nodes
        except TrialFileError as error:
            return _Left(unsound=str(error))
        if outcome is not None and len(outcome.error) > _MAX_ERROR:
            more = len(outcome.error) - _MAX_ERROR
            text = f"{outcome.error[:_MAX_ERROR]}... ({more} more characters)"
            outcome = outcome.model_copy(update={"error": text})
        if result is not None and result.attempt != number:
            result = None  # lost ranks of an earlier attempt may still write theirs
        return _Left(outcome, result, nodes.root[: live.study.spec.resources.ranks])

    def _write_end(self, live: LiveAttempt, ended: EndedAttempt, left: _Left, now: float) -> bool:
        result = left.result if not ended.unsound else None
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
            "suspects": " ".join(suspects(after, left.nodes, ended.outcome)),
        }
        if result is not None:
            change["metrics"] = dict(result.metrics)
            change["mlflow_run_id"] = result.mlflow_run_id
        source = result if result is not None else ended.outcome
        if source is not None and source.events:
            change["marks"] = [event.model_dump() for event in _newest(source.events)]
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
            self.measures.attempts.labels(after.error_class).inc()
            words = (live.trial.id, live.attempt.number, after.state, after.cause)
            LOG.info("trial %s attempt %d: %s, %s", *words)
        return written


def _trial_of(job: Job) -> str:
    """Empty where the job names none: whoever reaches Ray, a trial too, can start any job."""
    trial = job.metadata.get("trial", "")
    return trial if _TRIAL.fullmatch(trial) else ""


def _kind(after: NextState) -> str:
    """Of the event. A trial that waits again after a person's pause is no retry."""
    return "retry" if after.state == "queued" and after.attempt != "stopped" else after.state


def _newest(events: Sequence[Event]) -> list[Event]:
    """As many as the ledger keeps, and one that counts those before them."""
    left_out = len(events) - _MAX_MARKS
    if left_out <= 0:
        return list(events)
    text = f"{left_out} earlier events are left out here; the trial's folder has them"
    first = events[left_out]
    return [Event(at=first.at, kind="left-out", step=first.step, text=text), *events[left_out:]]
