"""Which waiting trials start now, which must stop, and in words why the others wait.

Pure functions: no clock, no Ray, no database.

Order: priority + waiting time / `ageing_s` - the owner's share of the cluster, highest first; so a
whole cluster in one user's hands weighs as much as one point of priority or one `ageing_s` of
waiting. The first trial in that order that lacks resources is the head: the rest may pass it only
where the head still starts when it would have started without them (EASY backfill, Lifka 1995).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from operator import attrgetter
from typing import NamedTuple, TypeAlias

from contract.words import duration
from orchestrator.cluster.nodes import Node
from orchestrator.schedule.gang import Gang, Shape, fit, needs, place, ranks_on, take, unit
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


class Wait(NamedTuple):
    """`position`: 1 starts next; 0 where the trial waits for something else than resources."""

    trial: str
    position: int
    why: str
    lacks: bool = False  # resources: a capacity request on a cluster that can grow

    # A named tuple, because a round makes ten thousand of them.


Decision: TypeAlias = Start | Stop | GiveUp | Wait

# Trials of equal shape fit in the same places: a gang's shape and the nodes that it avoids.
_Shape: TypeAlias = tuple[Shape, tuple[str, ...]]


# Seconds until a gang frees its place, its trial, the gang and the place.
_End: TypeAlias = tuple[float, str, Gang, Mapping[str, int]]


# What the trials of a group share. In C: it is asked of ten thousand trials in a round.
_KIND = attrgetter("owner", "study", "gang.shape", "suspects", "backoff_s")


@dataclass
class _Group:
    """Trials that differ in age, priority and duration alone; the best of them is the last.

    Once one of them may not start, the others may not either: in a round the free resources only
    shrink, and the counts that limits hold against only grow. So a question is asked once for all.
    """

    trials: list[int]  # indices into the situation's waiting trials
    reason: str = ""  # why all that are left wait
    lacks: bool = False
    in_line: bool = False  # they have a position, because resources are all that they wait for


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
        self.ends: list[_End] = []
        for run in situation.running:
            placement = run.placement or fit(run.gang, self.free) or {}
            if not run.placement:
                take(self.free, run.gang, placement)
            self._count(run.study, run.owner, run.gang)
            self.ends.append((max(0.0, run.seconds_left), run.trial, run.gang, placement))
        self.scores = [
            trial.priority + trial.age_s / limits.ageing_s for trial in situation.waiting
        ]
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
        # by node, how many ranks of such a gang it holds now
        self.rooms: dict[_Shape, tuple[Gang, dict[str, int]]] = {}
        # what it needs and what is free; an admission clears them
        self.words: dict[_Shape, str] = {}
        self.decided: list[Decision] = []
        self.waiting: list[_Group] = []  # groups that cannot start any more

    def decisions(self) -> list[Decision]:
        self.decided += self._over_budget()
        for group in self._in_order():
            self._consider(group)
        return self.decided + self._waits()

    # --- order ---

    def _groups(self) -> Iterable[_Group]:
        groups: dict[tuple[str, str, Shape, tuple[str, ...], float], list[int]] = defaultdict(list)
        for index, kind in enumerate(map(_KIND, self.situation.waiting)):
            groups[kind].append(index)
        for trials in groups.values():
            # sorting is stable, so equal trials pop in the order in which they came
            trials.reverse()
            trials.sort(key=self.scores.__getitem__)
            yield _Group(trials)

    def _in_order(self) -> Iterable[_Group]:
        """The group of the best trial that may still start, again and again.

        An owner's share grows with each admission, so the order is not known in advance. The heap
        holds each group once. A key that is too small by then is put right when it is popped.
        """
        heads = [(*self._key(group.trials[-1]), group) for group in self._groups()]
        heapq.heapify(heads)
        while heads:
            key, owner, index, group = heads[0]
            now = self._key(group.trials[-1])
            if now != (key, owner, index):
                heapq.heapreplace(heads, (*now, group))
                continue
            yield group
            if group.trials and not group.reason:
                heapq.heapreplace(heads, (*self._key(group.trials[-1]), group))
            else:
                heapq.heappop(heads)

    def _key(self, index: int) -> tuple[float, str, int]:
        """What sorts first is next; no two trials have the same."""
        owner = self.situation.waiting[index].owner
        return self.share[owner] - self.scores[index], owner, index

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

    # --- the best trial of a group ---

    def _consider(self, group: _Group) -> None:
        """Starts the group's best trial, or says why none of the group starts."""
        trial = self.situation.waiting[group.trials[-1]]
        if self._held_back(group, trial):
            return
        if not self.total:
            self._hold(group, "the cluster has no node yet")
            return
        avoid = self._avoided(trial)
        shape = _shape(trial.gang, avoid)
        if not self._holdable(trial.gang, ()):
            why = f"needs {needs(trial.gang)}; the whole cluster holds {self._whole(trial.gang)}"
            self._hold(group, why, lacks=True)
            return
        placement = self._place(trial.gang, avoid)
        if placement is None:
            self._lacks(group, trial, avoid)
        elif self.head is not None and not self._harmless(trial, placement):
            self._delays(group, trial)
        else:
            group.trials.pop()
            self._start(trial, shape, placement)

    def _start(self, trial: Waiting, shape: _Shape, placement: dict[str, int]) -> None:
        take(self.free, trial.gang, placement)
        self._count(trial.study, trial.owner, trial.gang)
        self.words.clear()
        for gang, room in self.rooms.values():
            room.update({n: ranks_on(gang, self.free[n]) for n in placement if n in room})
        self.ends.append((max(0.0, trial.seconds), trial.trial, trial.gang, placement))
        passed = (
            f", passing trial {self.head.trial} without delaying it"
            if self.head is not None
            else ""
        )
        avoid = shape[1]
        away = f", not on {', '.join(avoid)}, where it was lost" if avoid else ""
        why = f"{needs(trial.gang)} are free{passed}{away}"
        self.decided.append(Start(trial.trial, placement, why, avoid))

    def _hold(self, group: _Group, why: str, *, lacks: bool = False, in_line: bool = False) -> None:
        """All that are left of the group wait for this."""
        group.reason, group.lacks, group.in_line = why, lacks, in_line
        self.waiting.append(group)

    def _delays(self, group: _Group, trial: Waiting) -> None:
        """They fit and would delay the head; those that end before it starts go on trying."""
        assert self.head is not None
        waiting = self.situation.waiting
        short = [i for i in group.trials if 0 <= waiting[i].seconds <= self.head_start_s]
        long = [i for i in group.trials if not 0 <= waiting[i].seconds <= self.head_start_s]
        why = (
            f"needs {needs(trial.gang)}; fits now but would delay trial {self.head.trial}, "
            "which is next"
        )
        self._hold(_Group(long), why, lacks=True, in_line=True)
        group.trials = short

    def _place(self, gang: Gang, avoid: tuple[str, ...]) -> dict[str, int] | None:
        shape = _shape(gang, avoid)
        if shape in self.too_big:
            return None
        if shape not in self.rooms:
            free = _without(self.free, avoid)
            room = {node: ranks_on(gang, amounts) for node, amounts in free.items()}
            self.rooms[shape] = gang, room
        placement = place(gang, self.rooms[shape][1])
        if placement is None:
            self.too_big.add(shape)
        return placement

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

    def _held_back(self, group: _Group, trial: Waiting) -> bool:
        """Whether the group may not start whatever is free; then its decisions are made."""
        study = self.situation.studies.get(trial.study, StudyLimits())
        if study.gpu_hours and study.gpu_hours_used >= study.gpu_hours:
            why = _budget_in_words(study)
            self.decided += [GiveUp(each.trial, why) for each in self._emptied(group)]
            return True
        if trial.backoff_s > 0:
            why = f"tries again in {duration(trial.backoff_s)} after a failed attempt"
            self._hold(group, why)
            return True
        why = ""
        cap = self.limits.running_per_user
        if study.max_parallel and self.by_study[trial.study] >= study.max_parallel:
            why = f"its study runs at most {study.max_parallel} trials at once (max_parallel)"
        elif cap and self.by_owner[trial.owner] >= cap:
            why = f"user {trial.owner} runs {cap} trials, the most a user may"
        elif self.limits.running and self.running >= self.limits.running:
            why = f"{self.running} trials run, the most this service may"
        if why:
            self._hold(group, why)
        return why != ""

    def _emptied(self, group: _Group) -> list[Waiting]:
        """All that are left of the group, which is over with that."""
        trials, group.trials = group.trials, []
        return [self.situation.waiting[index] for index in reversed(trials)]

    def _lacks(self, group: _Group, trial: Waiting, avoid: tuple[str, ...]) -> None:
        shape = _shape(trial.gang, avoid)
        if shape not in self.words:
            away = f" not on {', '.join(avoid)}, where it was lost" if avoid else ""
            self.words[shape] = f"needs {needs(trial.gang)}{away}; {self._free(trial.gang)}"
        why = self.words[shape]
        if self.head is None:
            group.trials.pop()
            self.head, self.head_avoids = trial, avoid
            self._reserve()
            when = f", in about {duration(self.head_start_s)}" if self.head_start_s > 0 else ""
            words = f"{why}; next, after {self.head_after} ends{when}"
            self.decided.append(Wait(trial.trial, 1, words, True))
        self._hold(group, f"{why}; behind trial {self.head.trial}", lacks=True, in_line=True)

    def _waits(self) -> list[Wait]:
        """Of all groups, those in line first and in the order in which they would start."""
        waiting, scores = self.situation.waiting, self.scores
        waits: list[Wait] = []
        in_line: list[int] = []
        keys: list[float] = []
        reasons: list[str] = []
        for group in self.waiting:
            why, trials = group.reason, group.trials
            if not group.in_line:
                waits += [Wait(waiting[i].trial, 0, why, group.lacks) for i in reversed(trials)]
            elif trials:
                share = self.share[waiting[trials[0]].owner]
                in_line += trials
                keys += [share - scores[index] for index in trials]
                reasons += [why] * len(trials)
        # by key, then by the order in which they came
        order = sorted(range(len(in_line)), key=in_line.__getitem__)
        order.sort(key=keys.__getitem__)
        names = [waiting[in_line[place]].trial for place in order]
        positions = count(2 if self.head is not None else 1)
        whys = [reasons[place] for place in order]
        return [*map(Wait, names, positions, whys, repeat(True)), *waits]

    # --- the head's reservation ---

    def _reserve(self) -> None:
        """When the head starts if nothing else does, and what is free then.

        An end that is not known counts as now.
        """
        ends = sorted(self.ends, key=lambda end: (end[0], end[1]))
        # With each end more is free: the first one that suffices is found by halves.
        counts = range(1, len(ends) + 1)
        first = bisect_left(counts, True, key=lambda number: self._starts_after(ends[:number]))
        if first < len(ends):
            self.head_start_s, trial = ends[first][:2]
            self.head_after = f"trial {trial}"
            self.later = self._after(ends[: first + 1])
            return
        # Free and running together are less than the cluster: another program uses the rest. Its
        # end is not known, so the reservation is what the whole cluster has.
        self.head_start_s, self.head_after = 0.0, "another program"
        self.later = {node: dict(total) for node, total in self.total.items()}

    def _after(self, ends: Sequence[_End]) -> dict[str, dict[str, float]]:
        """What is free after these."""
        later = {node: dict(free) for node, free in self.free.items()}
        for _, _, ended, placement in ends:
            take(later, ended, placement, -1)
        return later

    def _starts_after(self, ends: Sequence[_End]) -> bool:
        assert self.head is not None
        return fit(self.head.gang, _without(self._after(ends), self.head_avoids)) is not None

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
