"""What is written to studies and trials.

A change of state names the states that it starts from. So of two threads that want to change one
trial (a person's cancel and the loop) one succeeds, and the other learns that it did not.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

from sqlalchemy import ColumnElement, func, insert, literal, select, update

from contract.attempt import Wish
from contract.files import uri_join
from contract.study import FINAL_STATES, Looks, Submission, TrialState
from orchestrator.ledger import queries, sharing
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.rows import OPEN_STUDY, Json
from orchestrator.ledger.tables import EVENTS, STUDIES, TRIALS

_TAKEN_AT_ONCE = 100  # results, in one transaction


class TrialChange(TypedDict, total=False):
    """The columns of a trial that change after it was submitted."""

    state: TrialState
    queued_at: float
    not_before: float
    wish: Wish
    attempts: int
    failures: int
    lost: int
    best_step: int
    metrics: dict[str, float]
    error: str
    error_class: str
    folder: str
    cached_from: str
    mlflow_run_id: str
    mlflow_closed: bool
    progress: Json
    moved_at: float
    marks: list[Json]
    rank_seconds: float | ColumnElement[float]
    suspects: str


def move_trial(
    transaction: Transaction,
    trial: str,
    states: Sequence[TrialState],
    *,
    at_attempt: int = 0,
    with_wish: Wish | None = None,
    **change: Unpack[TrialChange],
) -> bool:
    """Changes a trial that is in one of `states`, and at this attempt and with this wish if named.

    False if it is not: then nothing changes.
    """
    # One statement reads and writes: between two of them another thread could change the trial.
    query = update(TRIALS).where(TRIALS.c.id == trial, TRIALS.c.state.in_(states))
    if at_attempt:
        query = query.where(TRIALS.c.attempts == at_attempt)
    if with_wish is not None:
        query = query.where(TRIALS.c.wish == with_wish)
    return transaction.execute(query.values(**change)).rowcount == 1


def move_trials(
    transaction: Transaction,
    which: ColumnElement[bool],
    event: tuple[str, str],
    now: float,
    **change: Unpack[TrialChange],
) -> int:
    """Changes all trials that meet a condition, with an event for each; how many there were.

    Two statements for any number of trials: 10,000 single ones hold SQLite's one lock for so long
    that the lease runs out. The caller has locked the trials' study. event: its kind and cause.
    """
    kind, cause = (literal(text) for text in event)
    names = ("at", "study", "trial", "attempt", "kind", "cause")
    rows = select(literal(now), TRIALS.c.study, TRIALS.c.id, literal(0), kind, cause)
    told = rows.where(which).order_by(TRIALS.c.study, TRIALS.c.position)
    transaction.execute(insert(EVENTS).from_select(names, told))
    return transaction.execute(update(TRIALS).where(which).values(**change)).rowcount


# --- submitting ----------------------------------------------------------------------------------


def add_study(
    transaction: Transaction, submission: Submission, folder: str, owner: str, now: float
) -> str:
    """Writes a study with its trials; the study's id. folder: below it each study has its own.

    A trial whose identity has a result is done at once, unless the submission is `fresh`.
    """
    # The random end lets two studies have one name.
    study = f"{submission.study.name}-{secrets.token_hex(3)}"
    transaction.execute(
        insert(STUDIES).values(
            id=study,
            name=submission.study.name,
            owner=owner,
            state="active",
            priority=submission.study.priority,
            created_at=now,
            storage=folder,
            code=submission.code,
            spec=submission.study.model_dump(mode="json"),
            study_yaml=submission.study_yaml,
            warnings=list(submission.warnings),
            fresh=submission.fresh,
            # NULL, because the pair of owner and key is unique and most studies have no key
            idempotency_key=submission.idempotency_key or None,
            verdicts=queries.verdicts_on(
                transaction, [trial.identity for trial in submission.trials]
            ),
        )
    )
    record(
        transaction,
        "submitted",
        f"{len(submission.trials)} trials, by {owner}",
        study=study,
        at=now,
    )
    _add_trials(transaction, study, submission, folder, owner, now)
    end_study_if_over(transaction, study, now)
    return study


def _add_trials(
    transaction: Transaction,
    study: str,
    submission: Submission,
    folder: str,
    owner: str,
    now: float,
) -> None:
    finished: Mapping[sharing.Run, sharing.Source] = {}
    seeds = submission.study.seeds
    if not submission.fresh:
        runs = [sharing.run_of(plan) for plan in submission.trials]
        finished = sharing.finished_for(transaction, owner, runs)
    rows: list[Json] = []
    taken: list[Json] = []
    for position, plan in enumerate(submission.trials):
        trial = f"{study}-{position:03d}"
        # one statement inserts them all, so each row names the same columns
        change: TrialChange = {
            "state": "queued",
            "metrics": {},
            "marks": [],
            "folder": uri_join(folder, study, trial),
            "cached_from": "",
            "mlflow_run_id": "",
            "mlflow_closed": False,
        }
        source = finished.get(sharing.run_of(plan))
        if isinstance(seeds, Looks) and plan.seed >= seeds.start:
            change["state"] = "held"  # also one with a result: a look must not see it before
        elif source is not None:
            change = _taken_from(source)
            cause = f"taken from trial {source.id}, run by {source.ran_by}"
            taken.append({"study": study, "trial": trial, "at": now, "cause": cause})
        own = {"id": trial, "study": study, "position": position, "queued_at": now, "progress": {}}
        rows.append({**own, **plan.model_dump(), "training": plan.training, **change})
    # in parts: a statement holds the JSON of all its runs at once
    for start in range(0, len(rows), 500):
        transaction.execute(insert(TRIALS), rows[start : start + 500])
    if taken:
        transaction.execute(insert(EVENTS).values(kind="cached", attempt=0), taken)


# --- results of other trials ---------------------------------------------------------------------


def _taken_from(source: sharing.Source) -> TrialChange:
    """What a trial takes over from a finished one with its identity."""
    return {
        "state": "done",
        "metrics": source.metrics,
        "marks": source.marks,
        "folder": source.folder,
        "cached_from": source.id,
        "mlflow_run_id": source.mlflow_run_id,
        "mlflow_closed": False,  # it gets a light run of its own
    }


def take_finished(ledger: Ledger, now: float) -> None:
    """Ends queued trials whose run another trial has finished meanwhile, with that one's result."""
    with ledger.reading() as transaction:
        twins = sharing.twins_of_finished(transaction)
        finished = {
            owner: sharing.finished_for(
                transaction, owner, {twin.run for twin in twins if twin.owner == owner}
            )
            for owner in {twin.owner for twin in twins}
        }
    by_study: dict[str, list[tuple[str, sharing.Source]]] = defaultdict(list)
    for trial, study, owner, run in twins:
        source = finished[owner].get(run)
        if source is not None:  # not another owner's, which nothing proves to be the same
            by_study[study].append((trial, source))
    for study, taken in by_study.items():
        # in parts, so that a long list keeps no other writer waiting
        for start in range(0, len(taken), _TAKEN_AT_ONCE):
            with ledger.writing() as transaction:
                _take(transaction, study, taken[start : start + _TAKEN_AT_ONCE], now)


def _take(
    transaction: Transaction,
    study: str,
    taken: Sequence[tuple[str, sharing.Source]],
    now: float,
) -> None:
    queries.lock_study(transaction, study)
    for trial, source in taken:
        if move_trial(transaction, trial, ["queued"], **_taken_from(source)):
            text = f"taken from trial {source.id}, run by {source.ran_by}"
            record(transaction, "cached", text, study=study, trial=trial, at=now)
    end_study_if_over(transaction, study, now)


# --- stopping and ending -------------------------------------------------------------------------


def ask_to_stop(
    ledger: Ledger,
    trial: str,
    wish: Wish,
    why: str,
    now: float,
    *,
    kind: str = "stopping",
    at_attempt: int = 0,
) -> None:
    """A starting or running trial writes a checkpoint and ends.

    wish: what becomes of the trial then. kind: of the event. at_attempt: nothing happens if the
    trial is at another one by now.
    """
    with ledger.writing() as transaction:
        row = queries.trial_row(transaction, trial)
        if row is not None and move_trial(
            transaction,
            trial,
            ["starting", "running"],
            at_attempt=at_attempt,
            state="stopping",
            wish=wish,
        ):
            record(transaction, kind, why, study=row.study, trial=trial, attempt=at_attempt, at=now)


def give_up(
    ledger: Ledger,
    study: str,
    trials: Sequence[str],
    error_class: Literal["budget", "person"],
    why: str,
    now: float,
) -> None:
    """Ends queued trials of a study that will never run.

    They are cancelled if the budget of the study is used up, and failed if a person must change
    something.
    """
    state: TrialState = "cancelled" if error_class == "budget" else "failed"
    with ledger.writing() as transaction:
        queries.lock_study(transaction, study)
        for start in range(0, len(trials), 500):  # SQLite's limit of parameters
            which = TRIALS.c.id.in_(trials[start : start + 500]) & (TRIALS.c.state == "queued")
            change: TrialChange = {"state": state, "error": why, "error_class": error_class}
            move_trials(transaction, which, (state, why), now, **change)
        end_study_if_over(transaction, study, now)


def end_study_if_over(transaction: Transaction, study: str, now: float) -> str:
    """Gives a study its final state once all its trials have theirs.

    The state, or "" if nothing changes.
    """
    query = select(TRIALS.c.state, func.count()).where(TRIALS.c.study == study)
    counts: dict[str, int] = dict(transaction.execute(query.group_by(TRIALS.c.state)).all())
    if not counts.keys() <= set(FINAL_STATES):
        return ""
    # one failed trial makes a failed study, whatever became of the others
    state = next((state for state in ("failed", "cancelled") if state in counts), "done")
    changed = transaction.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state.in_(OPEN_STUDY))
        .values(state=state, ended_at=now)
    ).rowcount
    if not changed:
        return ""
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    record(transaction, f"study-{state}", f"all trials ended: {summary}", study=study, at=now)
    return state


# --- looks and verdicts --------------------------------------------------------------------------


class Noted(NamedTuple):
    """What a look makes of a study. release, spare: trials that run now, and that never run.

    seen: the state of each trial that it looked at.
    """

    look: Json
    text: str
    verdicts: Sequence[Json]
    release: Sequence[str]
    spare: Sequence[str]
    seen: Mapping[str, TrialState]


def note_look(ledger: Ledger, study: str, before: int, noted: Noted, now: float) -> bool:
    """False, and nothing changes, if the study had not `before` looks or a trial moved since."""
    with ledger.writing() as transaction:
        row = queries.lock_study(transaction, study)
        states = {trial.id: trial.state for trial in queries.trials(transaction, study)}
        if row is None or len(row.looks) != before:
            return False
        if any(states.get(trial) != state for trial, state in noted.seen.items()):
            return False  # somebody tries one again: the look waits for it
        for trial in noted.release:
            move_trial(transaction, trial, ["held"], state="queued", queued_at=now)
        for trial in noted.spare:
            move_trial(transaction, trial, ["held"], state="spared", mlflow_closed=True)
        values = {
            "looks": [*row.looks, noted.look],
            "verdicts": [*row.verdicts, *noted.verdicts],
        }
        transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(values))
        record(transaction, "look", noted.text, study=study, at=now)
        end_study_if_over(transaction, study, now)
    return True


def note_verdicts(ledger: Ledger, study: str, verdicts: Sequence[Json], now: float) -> None:
    """Of a study that is over: they stand from now on."""
    with ledger.writing() as transaction:
        row = queries.lock_study(transaction, study)
        if row is None or row.judged or row.state not in FINAL_STATES:
            return  # it is tried again
        values = {"verdicts": [*row.verdicts, *verdicts], "judged": True}
        transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(values))
        words = "; ".join(f"{one['name']}: {one['verdict']}" for one in verdicts)
        if words:
            record(transaction, "verdicts", words, study=study, at=now)


# --- MLflow and the webhook ----------------------------------------------------------------------


def set_parent_run(ledger: Ledger, study: str, experiment: str, run_id: str) -> None:
    """Notes the study's experiment and parent run in MLflow."""
    values = {"mlflow_experiment": experiment, "mlflow_run_id": run_id}
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(values))


def close_trial(ledger: Ledger, trial: str, run_id: str) -> None:
    """Notes that MLflow knows of the trial's end. run_id: of its run, empty if it has none."""
    change: TrialChange = {"mlflow_closed": True}
    if run_id:
        change["mlflow_run_id"] = run_id
    with ledger.writing() as transaction:
        # a retry may have put it back in the queue meanwhile: then its run goes on
        move_trial(transaction, trial, FINAL_STATES, **change)


def close_study(ledger: Ledger, study: str) -> None:
    """Notes that MLflow knows of the study's end."""
    with ledger.writing() as transaction:
        query = update(STUDIES).where(STUDIES.c.id == study)
        transaction.execute(query.values(mlflow_closed=True))


def note_webhook(ledger: Ledger, study: str) -> None:
    """Notes that the webhook knows of the study's end."""
    with ledger.writing() as transaction:
        query = update(STUDIES).where(STUDIES.c.id == study)
        transaction.execute(query.values(webhook_sent=True))
