"""What the end of an attempt means for its trial."""

from __future__ import annotations

from dataclasses import replace

import pytest

from contract.attempt import ExitStatus, Outcome
from orchestrator.schedule.attempt_end import EndedAttempt, after_attempt, suspects
from orchestrator.settings import Limits

LIMITS = Limits(backoff_s=10, lost_without_progress=3)
LOST = EndedAttempt(
    outcome=None, has_result=False, exit_code=None, message="", wish="", step=0, best_step=0,
    failures=0, lost=0, last_error="", max_attempts=3,
)  # fmt: skip


def failed(error_class: str, error: str = "boom", rank: int = -1) -> EndedAttempt:
    outcome = Outcome.model_validate(
        {"state": "failed", "error_class": error_class, "error": error, "rank": rank}
    )
    return replace(LOST, outcome=outcome, exit_code=ExitStatus.FAILED)


def test_a_result_is_the_end_whatever_was_wished():
    done = replace(LOST, outcome=Outcome(state="done"), has_result=True, exit_code=ExitStatus.DONE)
    for wish in ("", "cancel", "pause", "stall"):
        assert after_attempt(replace(done, wish=wish), LIMITS).state == "done"


def test_a_result_whose_account_was_lost_still_counts():
    assert after_attempt(replace(LOST, has_result=True, exit_code=-9), LIMITS).state == "done"


@pytest.mark.parametrize("error_class", ["person", "out_of_memory", "diverged"])
def test_errors_that_a_retry_repeats_are_final(error_class):
    after = after_attempt(failed(error_class, "reason and remedy"), LIMITS)
    assert (after.state, after.error_class, after.error) == (
        "failed",
        error_class,
        "reason and remedy",
    )


@pytest.mark.parametrize(
    ("code", "error_class", "state"),
    [
        (ExitStatus.INPUT, "person", "failed"),
        (ExitStatus.OUT_OF_MEMORY, "out_of_memory", "failed"),
        (ExitStatus.DIVERGED, "diverged", "failed"),
        (ExitStatus.PREEMPTED, "node", "queued"),
        (ExitStatus.FAILED, "unknown", "queued"),
        (ExitStatus.DONE, "unknown", "queued"),  # without a result it is not done
        (-9, "node", "queued"),
        (137, "node", "queued"),
        (None, "node", "queued"),
    ],
)
def test_without_an_account_the_exit_status_tells(code, error_class, state):
    after = after_attempt(replace(LOST, exit_code=code), LIMITS)
    assert (after.error_class, after.state) == (error_class, state)


def test_out_of_memory_without_an_account_says_what_to_change():
    assert (
        "max_images_per_forward"
        in after_attempt(replace(LOST, exit_code=ExitStatus.OUT_OF_MEMORY), LIMITS).error
    )


def test_a_lost_node_is_free_while_the_trial_moves_and_ends_when_it_does_not():
    moved = after_attempt(replace(LOST, step=50, best_step=40, lost=2, failures=1), LIMITS)
    assert (moved.state, moved.lost, moved.failures, moved.delay_s) == ("queued", 1, 1, 0.0)
    still = after_attempt(replace(LOST, step=40, best_step=40, lost=1), LIMITS)
    assert (still.state, still.lost, still.delay_s) == ("queued", 2, 10.0)
    assert after_attempt(replace(LOST, step=40, best_step=40, lost=2), LIMITS).state == "failed"


def test_collective_failures_back_off_and_end_with_the_attempts():
    first = after_attempt(failed("collective"), LIMITS)
    assert (first.state, first.failures, first.delay_s) == ("queued", 1, 10.0)
    second = after_attempt(replace(failed("collective"), failures=1, last_error="boom"), LIMITS)
    assert (second.state, second.delay_s) == ("queued", 20.0)
    assert after_attempt(replace(failed("collective"), failures=2), LIMITS).state == "failed"


def test_an_unknown_error_is_tried_again_unless_it_is_the_same_one():
    assert after_attempt(failed("unknown"), LIMITS).state == "queued"
    same = after_attempt(replace(failed("unknown"), failures=1, last_error="boom"), LIMITS)
    assert (same.state, same.cause) == ("failed", "failed the same way twice")
    assert (
        after_attempt(
            replace(failed("unknown", "other"), failures=1, last_error="boom"), LIMITS
        ).state
        == "queued"
    )


def test_wishes():
    stopped = replace(LOST, outcome=Outcome(state="stopped"), exit_code=ExitStatus.STOPPED)
    assert after_attempt(replace(stopped, wish="cancel"), LIMITS).state == "cancelled"
    assert after_attempt(replace(LOST, wish="cancel"), LIMITS).state == "cancelled", (
        "also if it had to be killed"
    )
    paused = after_attempt(replace(stopped, wish="pause", failures=1), LIMITS)
    assert (paused.state, paused.attempt, paused.failures, paused.lost) == (
        "queued",
        "stopped",
        1,
        0,
    )
    stalled = after_attempt(replace(stopped, wish="stall"), LIMITS)
    assert (stalled.state, stalled.error_class, stalled.failures) == ("queued", "collective", 1)
    assert after_attempt(replace(stopped, wish="budget"), LIMITS).state == "cancelled"


def test_a_person_s_error_beats_a_pause():
    assert after_attempt(replace(failed("person"), wish="pause"), LIMITS).state == "failed"


def test_after_a_broken_collective_its_nodes_are_suspects_that_of_the_named_rank_first():
    nodes = ["n0", "n0", "n1", "n2"]
    broken = failed("collective", "rank 2: connection closed by peer", rank=2)
    after = after_attempt(broken, LIMITS)
    assert suspects(after, nodes, broken.outcome) == ["n1", "n0", "n2"]
    assert suspects(after, [], broken.outcome) == [], "its rank 0 wrote no nodes down"
    # an older code package names its rank in the sentence alone
    older = failed("collective", "rank 2: connection closed by peer")
    assert suspects(after_attempt(older, LIMITS), nodes, older.outcome) == ["n0", "n1", "n2"]
    outcome = Outcome(state="stopped")
    hung = replace(LOST, outcome=outcome, exit_code=ExitStatus.STOPPED, wish="stall")
    assert suspects(after_attempt(hung, LIMITS), ["n0", "n1"], outcome) == ["n0", "n1"]


@pytest.mark.parametrize("error_class", ["person", "unknown", "node", "diverged"])
def test_other_ends_put_no_node_under_suspicion(error_class):
    ended = failed(error_class, "rank 0: boom", rank=0)
    assert suspects(after_attempt(ended, LIMITS), ["n0"], ended.outcome) == []


def test_after_a_preemption_the_nodes_are_about_to_go():
    outcome = Outcome(state="preempted")
    ended = replace(LOST, outcome=outcome, exit_code=ExitStatus.PREEMPTED, step=1)
    assert suspects(after_attempt(ended, LIMITS), ["n0", "n1", "n1"], outcome) == ["n0", "n1"]


def test_a_node_whose_gpu_broke_is_avoided_and_its_peers_are_not():
    nodes = ["n0", "n0", "n1", "n2"]
    error = "rank 2: CUDA error: uncorrectable ECC error encountered"
    outcome = Outcome(state="failed", error_class="node", error=error, rank=2, avoid_node=True)
    broken = replace(LOST, outcome=outcome, exit_code=ExitStatus.FAILED)
    assert suspects(after_attempt(broken, LIMITS), nodes, broken.outcome) == ["n1"]
    # an older code package names no node to avoid
    older = failed("node", error, rank=2)
    assert suspects(after_attempt(older, LIMITS), nodes, older.outcome) == []
