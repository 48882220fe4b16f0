"""Admission: properties over random situations, and the words that people read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cluster.nodes import Node
from orchestrator.schedule.decide import (
    GiveUp,
    Running,
    Situation,
    Start,
    Stop,
    StudyLimits,
    Wait,
    Waiting,
    decide,
    duration,
)
from orchestrator.schedule.gang import Gang, fit, needs, take
from orchestrator.settings import Limits

LIMITS = Limits()
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def node(name: str, gpus: float, free: float | None = None) -> Node:
    return Node(name, {"GPU": gpus, "CPU": 64}, {"GPU": gpus if free is None else free, "CPU": 64})


def waiting(trial: str, ranks: int = 1, **fields: object) -> Waiting:
    gang = Gang(ranks, {"GPU": 1}, int(fields.pop("max_nodes", 0)))  # type: ignore[call-overload]
    known = {"study": "s", "owner": "ann", **fields}
    return Waiting(trial, gang=gang, **known)  # type: ignore[arg-type]


def running(trial: str, ranks: int, left: float, place: dict[str, int], **fields: str) -> Running:
    known = {"study": "s", "owner": "ann", **fields}
    return Running(trial, gang=Gang(ranks, {"GPU": 1}), placement=place, seconds_left=left, **known)


def starts(situation: Situation, limits: Limits = LIMITS) -> list[str]:
    return [decision.trial for decision in decide(situation, limits) if isinstance(decision, Start)]


def why(situation: Situation, trial: str, limits: Limits = LIMITS) -> str:
    return next(d.why for d in decide(situation, limits) if d.trial == trial)


# --- random situations ---------------------------------------------------------------------------

gangs = st.builds(
    Gang,
    ranks=st.integers(1, 6),
    per_rank=st.fixed_dictionaries(
        {"GPU": st.sampled_from([0.5, 1.0, 2.0]), "CPU": st.sampled_from([1.0, 3.0])}
    ),
    max_nodes=st.integers(0, 2),
)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Nodes, running gangs on them (the free resources lack these), and a queue of three users."""
    totals = {
        f"n{i}": {"GPU": draw(st.sampled_from([2.0, 4.0, 8.0])), "CPU": 16.0}
        for i in range(draw(st.integers(1, 4)))
    }
    free = {name: dict(total) for name, total in totals.items()}
    runs = []
    for i in range(draw(st.integers(0, 5))):
        gang = draw(gangs)
        placement = fit(gang, free)
        if placement is not None:
            take(free, gang, placement)
            left = draw(st.sampled_from([-1.0, 0.0, 60.0, 600.0]))
            runs.append(Running(f"r{i}", "s0", draw(st.sampled_from("abc")), gang, placement, left))
    queue = [
        Waiting(
            trial=f"w{i}",
            study=f"s{draw(st.integers(0, 2))}",
            owner=draw(st.sampled_from("abc")),
            gang=draw(gangs),
            priority=draw(st.integers(-2, 2)),
            age_s=draw(st.sampled_from([0.0, 3600.0, 90000.0])),
            backoff_s=draw(st.sampled_from([0.0, 0.0, 0.0, 5.0])),
            seconds=draw(st.sampled_from([-1.0, 30.0, 300.0, 3000.0])),
        )
        for i in range(draw(st.integers(0, 12)))
    ]
    studies = {
        f"s{i}": StudyLimits(
            draw(st.integers(0, 3)),
            draw(st.sampled_from([0.0, 1.0])),
            draw(st.sampled_from([0.0, 2.0])),
        )
        for i in range(3)
    }
    return Situation(
        [Node(name, totals[name], free[name]) for name in totals], queue, runs, studies
    )


limits = st.builds(Limits, running=st.integers(0, 6), running_per_user=st.integers(0, 4))


@PATIENT
@given(situations(), limits)
def test_every_waiting_trial_gets_one_decision_and_a_reason(situation, limits):
    decided = [d for d in decide(situation, limits) if not isinstance(d, Stop)]
    assert sorted(d.trial for d in decided) == sorted(w.trial for w in situation.waiting)
    assert all(d.why for d in decided)
    assert decide(situation, limits) == decide(situation, limits)


@PATIENT
@given(situations(), limits)
def test_whole_gangs_start_within_what_is_free_on_each_node(situation, limits):
    free = {n.id: dict(n.free) for n in situation.nodes}
    gang = {w.trial: w.gang for w in situation.waiting}
    for decision in decide(situation, limits):
        if isinstance(decision, Start):
            assert sum(decision.placement.values()) == gang[decision.trial].ranks
            most = gang[decision.trial].max_nodes
            assert not most or len(decision.placement) <= most
            take(free, gang[decision.trial], decision.placement)
    assert all(amount >= -1e-6 for amounts in free.values() for amount in amounts.values())


@PATIENT
@given(situations(), limits)
def test_caps_and_budgets_hold(situation, limits):
    started = set(starts(situation, limits))
    now = [*situation.running, *(w for w in situation.waiting if w.trial in started)]
    if limits.running:
        assert len(now) <= max(limits.running, len(situation.running))
    for owner in "abc":
        before = sum(r.owner == owner for r in situation.running)
        if limits.running_per_user:
            assert sum(t.owner == owner for t in now) <= max(limits.running_per_user, before)
    for name, study in situation.studies.items():
        fresh = [w for w in situation.waiting if w.trial in started and w.study == name]
        before = sum(r.study == name for r in situation.running)
        assert not study.max_parallel or len(fresh) + before <= max(study.max_parallel, before)
        assert not fresh or not study.gpu_hours or study.gpu_hours_used < study.gpu_hours
    assert not any(w.backoff_s > 0 for w in situation.waiting if w.trial in started)


def head_of(situation: Situation, limits: Limits) -> Waiting | None:
    """The first trial that lacks resources which the empty cluster has."""
    first = [d for d in decide(situation, limits) if isinstance(d, Wait) and d.position == 1]
    return next((w for w in situation.waiting if first and w.trial == first[0].trial), None)


def earliest_start(
    situation: Situation, extra: list[tuple[Waiting, Start]], head: Waiting
) -> float:
    """When `head` fits if nothing else starts any more, the trials of `extra` beside it.

    Unknown ends count as now.
    """
    free = {n.id: dict(n.free) for n in situation.nodes}
    ends = [(max(0.0, r.seconds_left), r.gang, r.placement) for r in situation.running]
    for trial, start in extra:
        take(free, trial.gang, start.placement)
        ends.append(
            (trial.seconds if trial.seconds >= 0 else float("inf"), trial.gang, start.placement)
        )
    if fit(head.gang, free):
        return 0.0
    for seconds, gang, placement in sorted(ends, key=lambda end: end[0]):
        take(free, gang, placement, -1)
        if fit(head.gang, free):
            return seconds
    return float("inf")


@settings(PATIENT, max_examples=200)
@given(situations())
def test_backfill_never_delays_the_head_of_the_queue(situation):
    situation = replace(situation, studies={})
    decisions = decide(situation, LIMITS)
    head = head_of(situation, LIMITS)
    if head is None:
        return
    at = next(i for i, d in enumerate(decisions) if d.trial == head.trial)
    trials = {w.trial: w for w in situation.waiting}
    before = [(trials[d.trial], d) for d in decisions[:at] if isinstance(d, Start)]
    after = [(trials[d.trial], d) for d in decisions[at:] if isinstance(d, Start)]
    # those ahead of the head are in their right; an unknown end of theirs counts as now, as decide
    # says
    before = [(replace(w, seconds=max(0.0, w.seconds)), d) for w, d in before]
    assert earliest_start(situation, before + after, head) <= earliest_start(
        situation, before, head
    )


@PATIENT
@given(situations())
def test_nothing_idles_that_a_free_trial_could_use(situation):
    """If no trial lacks resources, all that may start do.

    The first in the queue always starts if it fits.
    """
    situation = replace(
        situation, studies={}, waiting=[replace(w, backoff_s=0.0) for w in situation.waiting]
    )
    decisions = [d for d in decide(situation, LIMITS) if not isinstance(d, Stop)]
    if decisions and isinstance(decisions[0], Wait):
        first = next(w for w in situation.waiting if w.trial == decisions[0].trial)
        assert fit(first.gang, {n.id: n.free for n in situation.nodes}) is None


# --- order ---------------------------------------------------------------------------------------


def test_priority_goes_first_and_equal_trials_keep_their_order():
    queue = [waiting("a"), waiting("b"), waiting("c", priority=1)]
    assert starts(Situation([node("n", 2)], queue, [])) == ["c", "a"]


def test_waiting_makes_up_for_priority():
    queue = [waiting("new", priority=2), waiting("old", age_s=3 * 3600)]
    assert starts(Situation([node("n", 1)], queue, [])) == ["old"]


def test_a_user_who_holds_less_goes_first():
    queue = [waiting("a1"), waiting("a2"), waiting("b1", owner="bob"), waiting("b2", owner="bob")]
    assert starts(Situation([node("n", 2)], queue, [])) == ["a1", "b1"]
    busy = running("r", 2, 100, {"n": 2})
    assert starts(Situation([node("n", 4, free=2)], queue, [busy])) == ["b1", "b2"]


def test_a_gang_fits_on_at_most_its_nodes_or_waits():
    nodes = [node("n0", 4), node("n1", 4), node("n2", 4)]
    assert starts(Situation(nodes, [waiting("two", 8, max_nodes=2)], [])) == ["two"]
    assert starts(Situation(nodes, [waiting("one", 8, max_nodes=1)], [])) == []
    assert fit(Gang(3, {"GPU": 1}), {"big": {"GPU": 8}, "small": {"GPU": 3}}) == {"small": 3}, (
        "large places stay whole"
    )


def test_a_short_trial_passes_the_head_and_a_long_one_does_not():
    run = running("r", 2, 600, {"n": 2})
    short, long, unknown = (
        waiting(name, 2, seconds=s) for name, s in (("short", 500), ("long", 700), ("unknown", -1))
    )
    for trial, expected in ((short, ["short"]), (long, []), (unknown, [])):
        assert (
            starts(Situation([node("n", 4, free=2)], [waiting("head", 4), trial], [run]))
            == expected
        )


def test_a_gang_too_large_for_the_cluster_does_not_block_the_others():
    assert starts(Situation([node("n", 2)], [waiting("huge", 8), waiting("small")], [])) == [
        "small"
    ]


# --- words ---------------------------------------------------------------------------------------


def test_reasons_name_the_need_the_lack_and_what_comes_before():
    run = running("roi-align/seed-1", 2, 2400, {"n": 2})
    queue = [waiting("head", 8, max_nodes=2), waiting("next", 7), waiting("held", 1)]
    situation = Situation([node("n", 4, free=2), node("m", 4)], queue, [run])
    assert why(situation, "head") == (
        "needs 8 ranks x 1 GPU on at most 2 nodes; 6 GPUs are free over 2 nodes; "
        "next, after trial roi-align/seed-1 ends, in about 40 min"
    )
    assert (
        why(situation, "next")
        == "needs 7 ranks x 1 GPU; 6 GPUs are free over 2 nodes; behind trial head"
    )
    assert (
        why(situation, "held")
        == "needs 1 rank x 1 GPU; fits now but would delay trial head, which is next"
    )


def test_reasons_name_the_limit_that_holds():
    two = [waiting("a"), waiting("b")]
    nodes = [node("n", 8)]
    assert "max_parallel" in why(Situation(nodes, two, [], {"s": StudyLimits(max_parallel=1)}), "b")
    assert "user ann runs 1" in why(Situation(nodes, two, []), "b", Limits(running_per_user=1))
    assert "the most this service may" in why(Situation(nodes, two, []), "b", Limits(running=1))
    assert (
        why(Situation(nodes, [waiting("a", backoff_s=42)], []), "a")
        == "tries again in 42 s after a failed attempt"
    )
    assert why(Situation([], two, []), "a") == "the cluster has no node yet"
    assert (
        why(Situation(nodes, [waiting("a", 9)], []), "a")
        == "needs 9 ranks x 1 GPU; the whole cluster holds 8 GPUs on 1 node"
    )


def test_a_spent_budget_stops_what_runs_and_gives_up_what_waits():
    run = running("r", 1, -1, {"n": 1})
    spent = {"s": StudyLimits(gpu_hours=1.0, gpu_hours_used=1.5)}
    decisions = decide(Situation([node("n", 8, free=7)], [waiting("w")], [run], spent), LIMITS)
    assert [(type(d), d.trial) for d in decisions] == [(Stop, "r"), (GiveUp, "w")]
    assert decisions[0].why == "the study used 1.50 of its 1 GPU-hours"


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (1500, "25 min"), (12600, "3.5 h")])
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


def test_needs_read_well():
    assert (
        needs(Gang(2, {"CPU": 4, "GPU": 0.5, "tpu": 1}, 1))
        == "2 ranks x 1 tpu and 0.5 GPUs and 4 CPUs on at most 1 node"
    )


# --- nodes under suspicion -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "suspects", "avoided"),
    [
        (2, ("n0",), ("n0",)),
        (2, ("n0", "n1"), ("n0", "n1")),
        (4, ("n0", "n1"), ("n0",)),  # the cluster can spare the first alone
        (6, ("n0", "n1"), ()),  # it takes every node there is
        (2, ("gone", "n2"), ("n2",)),
    ],
)
def test_a_gang_keeps_off_as_many_suspects_as_the_cluster_can_spare(ranks, suspects, avoided):
    nodes = [node(f"n{i}", 2) for i in range(3)]
    (start,) = decide(Situation(nodes, [waiting("t", ranks, suspects=suspects)], []), LIMITS)
    assert isinstance(start, Start)
    assert start.avoid == avoided
    assert not set(avoided) & set(start.placement)
    assert ("where it was lost" in start.why) == bool(avoided)


def test_a_gang_waits_for_a_sound_node_while_a_suspect_is_free_and_others_take_that():
    nodes = [node("n0", 2), node("n1", 2, free=0)]
    gangs = [waiting("hung", 2, suspects=("n0",)), waiting("other", 2)]
    situation = Situation(nodes, gangs, [running("r", 2, 600, {"n1": 2})])
    assert starts(situation) == ["other"]
    assert why(situation, "hung").startswith("needs 2 ranks x 1 GPU not on n0, where it was lost; ")
    assert "next, after trial r ends, in about 10 min" in why(situation, "hung")
