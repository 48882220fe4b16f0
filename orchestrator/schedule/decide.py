"""Which waiting trials start now, which must stop, and in words why the others wait.

Pure functions: no clock, no Ray, no database.

Order: priority + waiting time / `ageing_s` - the owner's share of the cluster, highest first; so a
whole cluster in one user's hands weighs as much as one point of priority or one `ageing_s` of
waiting. The first trial in that order that lacks resources is the head: the rest may pass it only
where the head still starts when it would have started without them (EASY backfill, Lifka 1995).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from contract.words import duration
from orchestrator.cluster.nodes import Node
from orchestrator.schedule.gang import Gang, Shape, fit, needs, take, unit
from orchestrator.settings import Limits

UNKNOWN = -1.0
ELSEWHERE = ""  # a placement on no node that we know of


@dataclass(frozen=True)
class Waiting:
    """`seconds`: an upper bound of how long it runs; UNKNOWN without a measurement."""

    trial: str
    study: str
    owner: str
    gang: Gang
    priority: float = 0.0
    age_s: float = 0.0
    backoff_s: float = 0.0  # still to wait after a failed attempt
    seconds: float = UNKNOWN
    # nodes of an attempt that hung or was preempted, most suspicious first
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """`placement`: ranks by node, which `Node.free` already lacks; empty before it has places."""

    trial: str
    study: str
    owner: str
    gang: Gang
    placement: Mapping[str, int] = field(default_factory=dict)
    seconds_left: float = UNKNOWN


@dataclass(frozen=True)
class StudyLimits:
    max_parallel: int = 0  # 0 is no limit
    gpu_hours: float = 0.0  # the budget; 0 is no limit
    gpu_hours_used: float = 0.0


@dataclass(frozen=True)
class Situation:
    nodes: Sequence[Node]
    waiting: Sequence[Waiting]
    running: Sequence[Running]
    studies: Mapping[str, StudyLimits] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """`avoid`: nodes that none of its ranks may sit on."""

    trial: str
    placement: Mapping[str, int]
    why: str
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stop:
    trial: str
    why: str


@dataclass(frozen=True)
class GiveUp:
    trial: str
    why: str


@dataclass(frozen=True)
class Wait:
    """`position`: 1 starts next; 0 where the trial waits for something else than resources."""

    trial: str
    position: int
    why: str
    lacks: bool = False  # resources: a capacity request on a cluster that can grow


Decision: TypeAlias = Start | Stop | GiveUp | Wait

# Trials of equal shape fit in the same places: a gang's shape and the nodes that it avoids.
_Shape: TypeAlias = tuple[Shape, tuple[str, ...]]


def decide(situation: Situation, limits: Limits) -> list[Decision]:
    """One decision for each waiting trial, and a Stop for each running one that must end."""
    return _Round(situation, limits).decisions()


class _Round:
    """The state of one call. With each admission less is free, and its owner's share grows."""

    def __init__(self, situation: Situation, limits: Limits) -> None:
        self.situation = situation
        self.limits = limits
        self.total = {node.id: dict(node.total) for node in situation.nodes}
        self.free = {node.id: dict(node.free) for node in situation.nodes}
        self.capacity = _sum(self.total.values())
        self.by_study: dict[str, int] = defaultdict(int)
        self.by_owner: dict[str, int] = defaultdict(int)
        self.share: dict[str, float] = defaultdict(float)
        self.running = 0
        # seconds until a gang frees its place, its trial, the gang and the place
        self.ends: list[tuple[float, str, Gang, Mapping[str, int]]] = []
        for run in situation.running:
            placement = run.placement or fit(run.gang, self.free) or {}
            if not run.placement:
                take(self.free, run.gang, placement)
            self._count(run.study, run.owner, run.gang)
            self.ends.append((max(0.0, run.seconds_left), run.trial, run.gang, placement))
        self.head: Waiting | None = None
        self.head_avoids: tuple[str, ...] = ()
        self.head_start_s = 0.0  # earliest start of the head, as far as it is known
        self.head_after = ""
        self.later: dict[str, dict[str, float]] = {}  # free at that time
        # Thousands of trials share a few shapes, so each question is answered once for a shape.
        # What is free only shrinks in a round: a shape that does not fit once never fits later.
        self.holdable: dict[_Shape, bool] = {}  # whether the empty cluster holds it
        self.too_big: set[_Shape] = set()
        self.harmful: set[_Shape] = set()  # it would delay the head
        # what it needs and what is free; an admission clears them
        self.words: dict[_Shape, str] = {}
        self.position = 0

    def decisions(self) -> list[Decision]:
        stops: list[Decision] = list(self._over_budget())
        return stops + [self._consider(trial) for trial in self._in_order()]

    # --- order ---

    def _in_order(self) -> Iterable[Waiting]:
        """The best of the owners' next trials, again and again.

        An owner's share grows with each admission, so the order is not known in advance. Each owner
        has a queue, and a heap holds the first trial of each: 10,000 trials are sorted once, not
        after each admission.
        """
        queues: dict[str, list[Waiting]] = defaultdict(list)
        for trial in self.situation.waiting:
            queues[trial.owner].append(trial)
        for queue in queues.values():
            # sorting is stable, so equal trials pop in the order in which they came
            queue.reverse()
            queue.sort(key=self._score)
        heads = [
            (self.share[owner] - self._score(queue[-1]), owner) for owner, queue in queues.items()
        ]
        heapq.heapify(heads)
        while heads:
            _, owner = heapq.heappop(heads)
            yield queues[owner].pop()
            if queues[owner]:  # its share, and no other owner's, may have grown by now
                heapq.heappush(heads, (self.share[owner] - self._score(queues[owner][-1]), owner))

    def _score(self, trial: Waiting) -> float:
        return trial.priority + trial.age_s / self.limits.ageing_s

    def _count(self, study: str, owner: str, gang: Gang) -> None:
        self.running += 1
        self.by_study[study] += 1
        self.by_owner[owner] += 1
        parts = [
            gang.ranks * amount / self.capacity[name]
            for name, amount in gang.per_rank.items()
            if self.capacity.get(name)
        ]
        self.share[owner] += max(parts, default=0.0)

    # --- one trial ---

    def _consider(self, trial: Waiting) -> Decision:
        held = self._held_back(trial)
        if held is not None:
            return held
        if not self.total:
            return Wait(trial.trial, 0, "the cluster has no node yet")
        avoid = self._avoided(trial)
        shape = _shape(trial.gang, avoid)
        if not self._holdable(trial.gang, ()):
            why = f"needs {needs(trial.gang)}; the whole cluster holds {self._whole(trial.gang)}"
            return Wait(trial.trial, 0, why, True)
        placement = None if shape in self.too_big else fit(trial.gang, _without(self.free, avoid))
        if placement is None:
            self.too_big.add(shape)
            return self._lacks(trial, avoid)
        if self.head is not None and not self._harmless(trial, placement):
            self.position += 1
            why = (
                f"needs {needs(trial.gang)}; fits now but would delay trial {self.head.trial}, "
                "which is next"
            )
            return Wait(trial.trial, self.position, why, True)
        take(self.free, trial.gang, placement)
        self._count(trial.study, trial.owner, trial.gang)
        self.words.clear()
        self.ends.append((max(0.0, trial.seconds), trial.trial, trial.gang, placement))
        passed = (
            f", passing trial {self.head.trial} without delaying it"
            if self.head is not None
            else ""
        )
        away = f", not on {', '.join(avoid)}, where it was lost" if avoid else ""
        return Start(trial.trial, placement, f"{needs(trial.gang)} are free{passed}{away}", avoid)

    def _holdable(self, gang: Gang, avoid: tuple[str, ...]) -> bool:
        """Whether the empty cluster holds it, without the nodes to avoid."""
        shape = _shape(gang, avoid)
        if shape not in self.holdable:
            self.holdable[shape] = fit(gang, _without(self.total, avoid)) is not None
        return self.holdable[shape]

    def _avoided(self, trial: Waiting) -> tuple[str, ...]:
        """As many of the suspects, from the first on, as the cluster can spare for this gang."""
        known = tuple(node for node in trial.suspects if node in self.total)
        spared = (known[:count] for count in range(len(known), 0, -1))
        return next((avoid for avoid in spared if self._holdable(trial.gang, avoid)), ())

    def _held_back(self, trial: Waiting) -> Decision | None:
        """The decision for a trial that may not start whatever is free; None if it may."""
        study = self.situation.studies.get(trial.study, StudyLimits())
        if study.gpu_hours and study.gpu_hours_used >= study.gpu_hours:
            return GiveUp(trial.trial, _budget_in_words(study))
        if trial.backoff_s > 0:
            why = f"tries again in {duration(trial.backoff_s)} after a failed attempt"
            return Wait(trial.trial, 0, why)
        if study.max_parallel and self.by_study[trial.study] >= study.max_parallel:
            why = f"its study runs at most {study.max_parallel} trials at once (max_parallel)"
            return Wait(trial.trial, 0, why)
        cap = self.limits.running_per_user
        if cap and self.by_owner[trial.owner] >= cap:
            why = f"user {trial.owner} runs {cap} trials, the most a user may"
            return Wait(trial.trial, 0, why)
        if self.limits.running and self.running >= self.limits.running:
            return Wait(trial.trial, 0, f"{self.running} trials run, the most this service may")
        return None

    def _lacks(self, trial: Waiting, avoid: tuple[str, ...]) -> Wait:
        self.position += 1
        shape = _shape(trial.gang, avoid)
        if shape not in self.words:
            away = f" not on {', '.join(avoid)}, where it was lost" if avoid else ""
            self.words[shape] = f"needs {needs(trial.gang)}{away}; {self._free(trial.gang)}"
        why = self.words[shape]
        if self.head is not None:
            return Wait(trial.trial, self.position, f"{why}; behind trial {self.head.trial}", True)
        self.head, self.head_avoids = trial, avoid
        self._reserve(trial.gang)
        when = f", in about {duration(self.head_start_s)}" if self.head_start_s > 0 else ""
        return Wait(
            trial.trial,
            self.position,
            f"{why}; next, after trial {self.head_after} ends{when}",
            True,
        )

    # --- the head's reservation ---

    def _reserve(self, gang: Gang) -> None:
        """When the head starts if nothing else does, and what is free then.

        An end that is not known counts as now.
        """
        self.later = {node: dict(free) for node, free in self.free.items()}
        for seconds, trial, ended, placement in sorted(self.ends, key=lambda end: (end[0], end[1])):
            take(self.later, ended, placement, -1)
            self.head_start_s, self.head_after = seconds, trial
            if fit(gang, _without(self.later, self.head_avoids)) is not None:
                return
        # Free and running together are less than the cluster: another program uses the rest. Its
        # end is not known, so the reservation is what the whole cluster has.
        self.head_start_s, self.head_after = 0.0, "of another program"
        self.later = {node: dict(total) for node, total in self.total.items()}

    def _harmless(self, trial: Waiting, placement: Mapping[str, int]) -> bool:
        """Whether `trial` is over before the head starts, or leaves the head its place.

        It then takes its place in `later`, where the next trial that wants to pass finds less.
        """
        assert self.head is not None
        if 0 <= trial.seconds <= self.head_start_s:
            return True
        shape = _shape(trial.gang, self._avoided(trial))
        if shape in self.harmful:
            return False
        take(self.later, trial.gang, placement)
        if fit(self.head.gang, _without(self.later, self.head_avoids)) is not None:
            return True
        take(self.later, trial.gang, placement, -1)
        self.harmful.add(shape)
        return False

    # --- budget and words ---

    def _over_budget(self) -> Iterable[Stop]:
        for run in self.situation.running:
            study = self.situation.studies.get(run.study, StudyLimits())
            if study.gpu_hours and study.gpu_hours_used >= study.gpu_hours:
                yield Stop(run.trial, _budget_in_words(study))

    def _free(self, gang: Gang) -> str:
        free = _sum(self.free.values())
        parts = [
            f"{max(0.0, free.get(name, 0.0)):g} {unit(name, 0)}"
            for name in sorted(gang.per_rank, reverse=True)
        ]
        many = len(self.free) > 1
        return f"{' and '.join(parts)} are free" + (f" over {len(self.free)} nodes" if many else "")

    def _whole(self, gang: Gang) -> str:
        parts = [
            f"{self.capacity.get(name, 0.0):g} {unit(name, 0)}"
            for name in sorted(gang.per_rank, reverse=True)
        ]
        return f"{' and '.join(parts)} on {len(self.total)} node" + (
            "s" if len(self.total) != 1 else ""
        )


# --- packing -------------------------------------------------------------------------------------


def _without(
    free: Mapping[str, dict[str, float]], avoid: tuple[str, ...]
) -> Mapping[str, Mapping[str, float]]:
    return {node: amounts for node, amounts in free.items() if node not in avoid} if avoid else free


def _shape(gang: Gang, avoid: tuple[str, ...]) -> _Shape:
    return gang.shape, avoid


def _sum(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for amounts in nodes:
        for name, amount in amounts.items():
            total[name] += amount
    return total


# --- words ---------------------------------------------------------------------------------------


def _budget_in_words(study: StudyLimits) -> str:
    return f"the study used {study.gpu_hours_used:.2f} of its {study.gpu_hours:g} GPU-hours"
