"""Which waiting trials start now, and starting them.

The ledger remembers what matters. An `Admission` keeps measurements and answers that it can find
again.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Literal, Protocol

from contract.attempt import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_MARKER,
    CHECKPOINT_NAME,
    LAST_WEIGHTS,
    SPEC_FILE,
)
from contract.files import uri_join
from orchestrator.cluster.jobs import Cluster
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import attempts, queries, sharing
from orchestrator.ledger.changes import ask_to_stop, give_up
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.rows import LiveAttempt, QueuedTrial, StudyBrief
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
from orchestrator.schedule.trouble import Troubles
from orchestrator.settings import ServiceSettings, code_files, code_name
from orchestrator.trial_folder import TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")
_FREE = Wait("", 0, "")
# `decide` needs an upper bound: a trial that runs for longer delays the head of the queue.
_SAFETY = 1.2
_STOP_MARGIN_S = 15  # beyond the grace: Ray must not end by force what still writes its checkpoint


class Credentials(Protocol):
    """What the trials of a study log in to MLflow with."""

    def made(self, study: str) -> bool:
        """Whether the server knows the login yet."""

    def environment(self, study: str) -> dict[str, str]: ...


class Admission:
    """waits: why each trial waits, by the last decision. mark: tells our jobs from others."""

    def __init__(self, ledger: Ledger, settings: ServiceSettings, troubles: Troubles) -> None:
        self.ledger = ledger
        self._troubles = troubles
        self.settings = settings
        self.waits: dict[str, Wait] = {}
        self.mlflow_trouble = ""  # why the server, which answers, lets nobody in
        self.mark = ledger.name()
        self.logins: Credentials | None = None  # without it trials have the nodes' own login
        self._nodes: Sequence[Node] = ()
        self._asked: list[Bundle] | None = None
        # By study. A study's specification never changes, and its trials share one gang: `decide`
        # knows equal gangs by their shape, which is computed once for each object.
        self._gangs: dict[str, Gang] = {}
        self._known_code: set[str] = set()
        self._problems: dict[str, str] = {}  # study -> what is wrong with its resources
        self._durations: dict[str, float] = {}  # seconds that a trial of this study took, at most
        self._no_uri_since = 0.0  # when a local MLflow was first asked for in vain; 0 once it is

    def admit(self, cluster: Cluster, nodes: Sequence[Node], tracking_uri: str, now: float) -> None:
        """Starts what may start, stops what its budget ends; `waits` says why the others wait."""
        self._nodes = nodes
        self._no_uri_since = 0.0 if tracking_uri else self._no_uri_since or now
        with self.ledger.reading() as transaction:
            live_attempts = queries.live_attempts(transaction)
            waiting = queries.waiting_trials(transaction)
            limits = study_limits(transaction, live_attempts, now)
            self._measure_durations(transaction, {trial.study.id for trial in waiting})
        held, free = self._hold_back(waiting, live_attempts, now)
        situation = Situation(
            nodes=self._nodes,
            waiting=[self._waiting(trial, now) for trial in free],
            running=self._running(live_attempts),
            studies=limits,
        )
        decisions = decide(situation, self.settings.limits)
        waits = {wait.trial: wait for wait in held}
        studies = {trial.id: trial.study.id for trial in free}
        over: dict[tuple[str, str], list[str]] = defaultdict(list)
        for decision in decisions:
            if isinstance(decision, Wait):
                waits[decision.trial] = decision
            elif isinstance(decision, GiveUp):
                over[studies[decision.trial], decision.why].append(decision.trial)
            else:
                with self._troubles.apart(decision.trial):
                    self._act(cluster, decision, tracking_uri, now)
        self._give_up(over, "budget", now)
        self.waits = waits
        if self.settings.autoscale:
            lacking = [trial for trial in free if waits.get(trial.id, _FREE).lacks]
            head = min(lacking, key=lambda trial: waits[trial.id].position or 1, default=None)
            self._ask_for_capacity(cluster, live_attempts, head, now)

    def _act(self, cluster: Cluster, decision: Start | Stop, tracking_uri: str, now: float) -> None:
        match decision:
            case Start():
                number = attempts.start_attempt(
                    self.ledger, decision.trial, now, decision.why, decision.avoid
                )
                if number:
                    self.submit(cluster, decision.trial, number, tracking_uri)
            case Stop():
                ask_to_stop(self.ledger, decision.trial, "budget", decision.why, now)

    def _give_up(
        self,
        over: Mapping[tuple[str, str], Sequence[str]],
        error_class: Literal["budget", "person"],
        now: float,
    ) -> None:
        """over: study and reason -> its trials, all at once: a transaction for each is slow."""
        for (study, why), trials in over.items():
            with self._troubles.apart(study):
                give_up(self.ledger, study, trials, error_class, why, now)

    def _ask_for_capacity(
        self,
        cluster: Cluster,
        live_attempts: Sequence[LiveAttempt],
        head: QueuedTrial | None,
        now: float,
    ) -> None:
        """Sends a request if it differs from the last one, which a new service does not know."""
        running = [self._gang(live.study) for live in live_attempts]
        gang = self._gang(head.study) if head is not None else None
        bundles = wanted(running, gang, self.settings.node_shapes)
        if bundles == self._asked or (not bundles and self._asked is None):
            return
        entry = f"exec {shlex.join(request_entry(bundles, self.settings.entry[0]))}"
        cluster.submit(request_id(self.mark, bundles, now), entry, {}, "", {})
        self._asked = bundles
        LOG.info("asked the cluster for %d bundles", len(bundles))

    def submit(self, cluster: Cluster, trial: str, number: int, tracking_uri: str) -> None:
        """Writes the attempt's spec and starts its job.

        Calling it twice starts one job, because Ray refuses a second one with the same submission
        id.
        """
        with self.ledger.reading() as transaction:
            row = queries.trial_row(transaction, trial)
            study = queries.study_row(transaction, row.study) if row is not None else None
            attempt = queries.attempt_row(transaction, trial, number)
            if row is None or study is None or attempt is None:
                return
        avoid, grace_s = attempt.avoid.split(), self.settings.grace_s
        shared = "" if study.fresh else self._trained(study.owner, row.training)
        spec = run_spec(row, study, number, avoid, tracking_uri, grace_s, shared)
        path = SPEC_FILE.format(attempt=number)
        TrialFolder(row.folder).write(path, json.dumps(spec, indent=1).encode())
        code, package = study.code, ""
        if code:
            package = f"_ray_pkg_{code[:32]}.zip"
            cluster.upload(package, lambda: self._read_code(code))
        environment = {
            **self.settings.environment,
            **(self.logins.environment(study.id) if self.logins is not None else {}),
            # `workers.ray_entry` takes SIGINT for a stop and SIGTERM for a preemption
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": f"{grace_s + _STOP_MARGIN_S:.0f}",
        }
        # `exec`: the signal must reach the driver, not a shell around it
        entry = f"exec {shlex.join([*self.settings.entry, '--spec', uri_join(row.folder, path)])}"
        metadata = {"maskray": self.mark, "trial": trial}
        cluster.submit(attempt.submission_id, entry, environment, package, metadata)
        attempts.note_submitted(self.ledger, attempt.submission_id)

    # --- what decide needs to know ---

    def _gang(self, study: StudyBrief) -> Gang:
        if study.id not in self._gangs:
            self._gangs[study.id] = gang_of(study.spec)
        return self._gangs[study.id]

    def _waiting(self, trial: QueuedTrial, now: float) -> Waiting:
        return Waiting(
            trial=trial.id,
            study=trial.study.id,
            owner=trial.study.owner,
            gang=self._gang(trial.study),
            priority=trial.study.priority,
            age_s=max(0.0, now - trial.queued_at),
            backoff_s=max(0.0, trial.not_before - now),
            seconds=self._durations.get(trial.study.id, UNKNOWN),
            suspects=tuple(trial.suspects.split()),
        )

    def _running(self, live_attempts: Sequence[LiveAttempt]) -> list[Running]:
        """Live attempts with their places; a gang whose ranks have not spoken has none yet.

        The nodes' free resources already lack a gang that has a place. Ray does not say over HTTP
        where it is, so it is put where that much is in use.
        """
        used = {
            node.id: {name: node.total[name] - node.free.get(name, 0.0) for name in node.total}
            for node in self._nodes
        }
        running = []
        for live in live_attempts:
            progress, gang = live.trial.progress, self._gang(live.study)
            if live.attempt.state != "running" or (
                progress is not None and progress.attempt != live.attempt.number
            ):
                progress = None
            placement: dict[str, int] = {}
            seconds = UNKNOWN
            if progress is not None:
                placement = fit(gang, used) or {ELSEWHERE: gang.ranks}
                take(used, gang, placement)
                seconds = UNKNOWN if progress.seconds_left is None else progress.seconds_left
            study = live.study
            running.append(Running(live.trial.id, study.id, study.owner, gang, placement, seconds))
        return running

    def _hold_back(
        self, waiting: Sequence[QueuedTrial], live_attempts: Sequence[LiveAttempt], now: float
    ) -> tuple[list[Wait], list[QueuedTrial]]:
        """Trials that wait for something that `decide` does not know, and the others in order.

        A trial that can never run is given up here, and is in neither list.
        """
        held: list[Wait] = []
        free: set[str] = set()
        over: dict[tuple[str, str], list[str]] = defaultdict(list)
        # By owner too: nobody waits for a run of another one who may lie in its identity.
        under_way = {
            (live.study.owner, run): live.trial.id
            for live in live_attempts
            for run in (live.trial.identity, live.trial.training)
            if run
        }
        # Identity or training -> the trial of it that waits in front.
        first: dict[tuple[str, str], str] = {}
        trained = cache(self._trained)  # asks the storage
        for trial in sorted(waiting, key=lambda trial: (-trial.study.priority, trial.queued_at)):
            if problem := self._never_runs(trial.study):
                over[trial.study.id, problem].append(trial.id)
            elif why := self._awaits(trial, under_way, first, trained, now):
                held.append(Wait(trial.id, 0, why))
            else:
                free.add(trial.id)
                if not trial.study.fresh:
                    first[trial.study.owner, trial.identity] = trial.id
                    if trial.training:
                        first[trial.study.owner, trial.training] = trial.id
        self._give_up(over, "person", now)
        return held, [trial for trial in waiting if trial.id in free]

    def _never_runs(self, study: StudyBrief) -> str:
        """Why this service can never run the study's trials; empty if it can."""
        if study.id not in self._problems:
            # An older version let such studies in. One of them must not stop the loop for all
            # others.
            self._problems[study.id] = study.spec_problem
        if problem := self._problems[study.id]:
            return problem
        # A cluster of others may grow, this machine does not. A missing code package comes first:
        # it can be sent again.
        local = self.settings.ray == "local" and not self._lacks_code(study)
        if local and not self._holdable(study):
            return f"needs {needs(self._gang(study))}: more than this machine has"
        return ""

    def _awaits(
        self,
        trial: QueuedTrial,
        under_way: Mapping[tuple[str, str], str],
        first: Mapping[tuple[str, str], str],
        trained: Callable[[str, str], str],
        now: float,
    ) -> str:
        """What the trial waits for, other than resources; empty if for nothing."""
        if self._lacks_code(trial.study):
            return "its code package is missing: submit the study's code again"
        if self._awaits_parent(trial.study, now):
            return (
                f"waits for the MLflow server{self.mlflow_trouble and f': {self.mlflow_trouble}'}"
            )
        if trial.study.fresh:
            return ""
        for run, words in (
            (trial.identity, "is the same run as"),
            (trial.training, "shares the training of"),
        ):
            key = (trial.study.owner, run)
            if key in under_way:
                why = f"{words} trial {under_way[key]}, under way"
            elif key in first:
                why = f"{words} trial {first[key]}, which waits first"
            else:
                continue
            # whoever only evaluates needs no other's steps
            if run == trial.identity or not trained(*key):
                return why
        return ""

    def _trained(self, owner: str, training: str) -> str:
        """The folder that a trial of this training can take its steps from; empty without one."""
        with self.ledger.reading() as transaction:
            over = sharing.finished_trainings(transaction, owner, training)
        return next((one.folder for one in over if _has_last_checkpoint(one)), "")

    def _lacks_code(self, study: StudyBrief) -> bool:
        code = study.code
        if code and code not in self._known_code:
            if not code_files(self.settings).exists(code_name(code)):
                return True
            self._known_code.add(code)
        return False

    def _read_code(self, sha256: str) -> bytes:
        data = code_files(self.settings).read_part(code_name(sha256))
        if data is None:
            self._known_code.discard(sha256)
            raise FileNotFoundError(
                f"code package {sha256[:12]} is gone from the storage; "
                "submit the study's code again"
            )
        return data

    def _holdable(self, study: StudyBrief) -> bool:
        # a head that is starting has no node yet: that says nothing about what it will hold
        whole = {node.id: node.total for node in self._nodes}
        return not whole or fit(self._gang(study), whole) is not None

    def _awaits_parent(self, study: StudyBrief, now: float) -> bool:
        lacks_login = self.logins is not None and not self.logins.made(study.id)
        wanted = self.settings.mlflow != "" and (not study.mlflow_run_id or lacks_login)
        # MLflow may stay down for hours: a study then starts without its parent run, and gets one
        # later
        if wanted and now - study.created_at < self.settings.mlflow_wait_s:
            return True
        # A trial that starts before a local server has its address would send nothing for good.
        nowhere = self.settings.mlflow != "" and self._no_uri_since > 0
        return nowhere and now - self._no_uri_since < self.settings.mlflow_wait_s

    def _measure_durations(self, transaction: Transaction, studies: set[str]) -> None:
        for study in studies:
            seconds = queries.longest_run_s(transaction, study)
            if seconds is not None:
                self._durations[study] = _SAFETY * seconds


def _has_last_checkpoint(trial: sharing.Finished) -> bool:
    """Whether a trial left its last step's checkpoint, whatever its evaluation came to.

    One that only evaluated has the weights, but no checkpoint of its own.
    """
    names = (
        CHECKPOINT_NAME.format(attempt=number, step=trial.step)
        for number in range(trial.attempts, 0, -1)
    )
    markers = (f"{CHECKPOINT_FOLDER}/{name}/{CHECKPOINT_MARKER}" for name in names)
    folder = TrialFolder(trial.folder)
    try:
        if folder.size(LAST_WEIGHTS) is None:  # it did not get to its last step
            return False
        return any(folder.size(marker) is not None for marker in markers)
    except TrialFileError as error:
        LOG.warning("%s: its training is not shared", error)
        return False
