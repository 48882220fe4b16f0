"""Admission at scale: `decide` over 1,000 GPUs and 10,000 trials, in simulated time.

Ours is the utilisation over the busy part of the schedule; the peer is strict
first-come-first-served with gangs, which never lets a trial pass another (what a queue without
backfill does). The bound is a packing without any waste: GPU-seconds of work over GPU-seconds of
the cluster. Also measured: the time of one decision, and the longest wait.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.cluster.nodes import Node
from orchestrator.schedule.decide import Running, Situation, Start, Waiting, decide
from orchestrator.schedule.gang import Gang, fit, take
from orchestrator.settings import Limits

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Trial:
    name: str
    owner: str
    gang: Gang
    seconds: float
    arrives: float
    priority: float


@dataclass(frozen=True)
class Outcome:
    makespan: float
    # of all GPU-seconds until the last trial started: afterwards there is nothing left to pack
    utilisation: float
    longest_wait: float
    decisions: list[float]  # seconds each
    waits_by_size: dict[int, float]  # ranks -> longest wait


def make_trials(count: int, seed: int, gpus: int) -> list[Trial]:
    """Gangs of 1 to 64 GPUs of twenty users, with run times over two orders of magnitude.

    They arrive within half of the time that the work takes.
    """
    draw = random.Random(seed)
    sizes, weights = (1, 2, 4, 8, 16, 32, 64), (30, 20, 20, 18, 8, 3, 1)
    parts = []
    for _ in range(count):
        ranks = min(draw.choices(sizes, weights)[0], gpus)
        parts.append((ranks, 60 * 10 ** draw.uniform(0, 2)))
    work = sum(ranks * seconds for ranks, seconds in parts) / gpus
    return [
        Trial(
            name=f"t{index:05d}",
            owner=f"u{draw.randrange(20):02d}",
            gang=Gang(ranks, {"GPU": 1.0}, max_nodes=0 if ranks > GPUS_PER_NODE else 1),
            seconds=seconds,
            arrives=draw.uniform(0, work / 2),
            priority=draw.choice((0, 0, 0, 1)),
        )
        for index, (ranks, seconds) in enumerate(parts)
    ]


Policy = Callable[
    [
        float,
        dict[str, dict[str, float]],
        Sequence[Trial],
        Sequence[tuple[float, Trial, dict[str, int]]],
    ],
    list[Start],
]


def ours(nodes: int, limits: Limits) -> Policy:
    total = {"GPU": float(GPUS_PER_NODE)}

    def policy(now, free, waiting, running):  # type: ignore[no-untyped-def]
        situation = Situation(
            nodes=[Node(f"n{i:03d}", total, free[f"n{i:03d}"]) for i in range(nodes)],
            waiting=[
                Waiting(
                    t.name, "study", t.owner, t.gang, t.priority, now - t.arrives, 0.0, t.seconds
                )
                for t in waiting
            ],
            running=[
                Running(t.name, "study", t.owner, t.gang, place, end - now)
                for end, t, place in running
            ],
        )
        return [decision for decision in decide(situation, limits) if isinstance(decision, Start)]

    return policy


def first_come(_now, free, waiting, _running):  # type: ignore[no-untyped-def]
    """The queue in order of arrival; the first gang that does not fit holds up all others."""
    left = {name: dict(amounts) for name, amounts in free.items()}
    starts = []
    for trial in waiting:
        placement = fit(trial.gang, left)
        if placement is None:
            break
        take(left, trial.gang, placement)
        starts.append(Start(trial.name, placement, ""))
    return starts


def simulate(trials: Sequence[Trial], nodes: int, policy: Policy, every_s: float) -> Outcome:
    """Asks the policy at most once in `every_s` simulated seconds, until all trials ended."""
    free = {f"n{i:03d}": {"GPU": float(GPUS_PER_NODE)} for i in range(nodes)}
    arriving = sorted(trials, key=lambda t: t.arrives, reverse=True)
    by_name = {t.name: t for t in trials}
    waiting: dict[str, Trial] = {}
    running: list[tuple[float, str, dict[str, int]]] = []
    now, used, last_start = 0.0, 0.0, 0.0
    waits: dict[str, float] = {}
    took: list[float] = []
    spans: list[tuple[float, float, int]] = []
    while arriving or waiting or running:
        ahead = [arriving[-1].arrives] if arriving else []
        ahead += [running[0][0]] if running else []
        now = max(now + every_s, min(ahead)) if ahead else now + every_s
        while arriving and arriving[-1].arrives <= now:
            trial = arriving.pop()
            waiting[trial.name] = trial
        while running and running[0][0] <= now:
            _, name, placement = heapq.heappop(running)
            take(free, by_name[name].gang, placement, -1)
        if not waiting:
            continue
        begin = time.perf_counter()
        started = policy(
            now,
            free,
            list(waiting.values()),
            [(end, by_name[n], place) for end, n, place in running],
        )
        took.append(time.perf_counter() - begin)
        for start in started:
            trial = waiting.pop(start.trial)
            take(free, trial.gang, start.placement)
            assert all(amounts["GPU"] >= -1e-6 for amounts in free.values()), (
                "a node was given away twice"
            )
            heapq.heappush(running, (now + trial.seconds, trial.name, dict(start.placement)))
            waits[trial.name] = now - trial.arrives
            spans.append((now, now + trial.seconds, trial.gang.ranks))
            last_start = now
    used = sum(
        ranks * (min(end, last_start) - min(begin, last_start)) for begin, end, ranks in spans
    )
    sizes = sorted({t.gang.ranks for t in trials})
    by_size = {size: max(waits[t.name] for t in trials if t.gang.ranks == size) for size in sizes}
    return Outcome(
        makespan=max(end for _, end, _ in spans),
        utilisation=used / (last_start * nodes * GPUS_PER_NODE) if last_start else 1.0,
        longest_wait=max(waits.values()),
        decisions=took,
        waits_by_size=by_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument(
        "--every-s", type=float, default=60.0, help="simulated seconds between two decisions"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    nodes = arguments.gpus // GPUS_PER_NODE
    trials = make_trials(arguments.trials, arguments.seed, nodes * GPUS_PER_NODE)
    limits = Limits()
    mine = simulate(trials, nodes, ours(nodes, limits), arguments.every_s)
    peer = simulate(trials, nodes, first_come, arguments.every_s)
    milliseconds = sorted(1000 * seconds for seconds in mine.decisions)
    work = sum(t.gang.ranks * t.seconds for t in trials)
    bound = max(work / (nodes * GPUS_PER_NODE), max(t.arrives + t.seconds for t in trials))
    report = {
        "name": "utilisation of 1000 GPUs by 10000 trials against first come, first served",
        "ours": round(mine.utilisation, 4),
        "peer": round(peer.utilisation, 4),
        "ratio": round(mine.utilisation / peer.utilisation, 4),
        "device": "simulation",
        "pairs": 1,
        "gpus": nodes * GPUS_PER_NODE,
        "trials": len(trials),
        "decisions": len(milliseconds),
        "decision_ms_median": round(statistics.median(milliseconds), 2),
        "decision_ms_p99": round(milliseconds[int(0.99 * (len(milliseconds) - 1))], 2),
        "makespan_over_bound": round(mine.makespan / bound, 4),
        "peer_makespan_over_bound": round(peer.makespan / bound, 4),
        "longest_wait_h": round(mine.longest_wait / 3600, 2),
        "longest_wait_h_by_gpus": {
            size: round(wait / 3600, 2) for size, wait in mine.waits_by_size.items()
        },
    }
    if not arguments.json:
        for name, value in report.items():
            print(f"{name:26} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
