"""Gangs of ranks that start as a whole: what one needs, and on which nodes it fits."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

# Ray counts in fixed point of 1e-4. Sums of halves and thirds must not miss by rounding.
EPSILON = 1e-6

Shape: TypeAlias = tuple[int, tuple[tuple[str, float], ...], int]


@dataclass(frozen=True)
class Gang:
    """Ranks that start as a whole.

    `per_rank` names only what it needs; `max_nodes` 0 is any number.
    """

    ranks: int
    per_rank: Mapping[str, float]
    max_nodes: int = 0

    @cached_property
    def shape(self) -> Shape:
        """Gangs of equal shape fit in the same places.

        It can be hashed, which the gang's dictionary cannot.
        """
        return (self.ranks, tuple(sorted(self.per_rank.items())), self.max_nodes)


def fit(gang: Gang, free: Mapping[str, Mapping[str, float]]) -> dict[str, int] | None:
    """Ranks by node for the whole gang, on as few nodes as possible; None if it does not fit.

    One node that holds all is the fullest such node, so that large places stay whole.
    """
    return place(gang, {node: ranks_on(gang, amounts) for node, amounts in free.items()})


def place(gang: Gang, room: Mapping[str, int]) -> dict[str, int] | None:
    """As `fit`. room: how many ranks of the gang's kind each node holds."""
    whole = [(ranks, node) for node, ranks in room.items() if ranks >= gang.ranks]
    if whole:
        return {min(whole)[1]: gang.ranks}
    # the largest places first: fewer nodes
    placement: dict[str, int] = {}
    left = gang.ranks
    some = sorted((-ranks, node) for node, ranks in room.items() if ranks > 0)
    for less, node in some[: gang.max_nodes or None]:
        placement[node] = min(left, -less)
        left -= placement[node]
        if left == 0:
            return placement
    return None


def ranks_on(gang: Gang, amounts: Mapping[str, float]) -> int:
    """How many ranks of the gang's kind these amounts hold: the scarcest resource decides."""
    # A plain loop: `fit` asks this of every node, a hundred thousand times in a round.
    fewest = sys.maxsize
    for name, need in gang.per_rank.items():
        fewest = min(fewest, math.floor((amounts.get(name, 0.0) + EPSILON) / need))
    return fewest


def take(
    free: dict[str, dict[str, float]], gang: Gang, placement: Mapping[str, int], sign: int = 1
) -> None:
    """Takes a placed gang out of `free` in place; puts it back with `sign` -1."""
    for node, ranks in placement.items():
        if node in free:
            for name, need in gang.per_rank.items():
                free[node][name] = free[node].get(name, 0.0) - sign * ranks * need


def needs(gang: Gang) -> str:
    """ "2 ranks x 1 GPU and 4 CPUs on at most 1 node" """
    parts = [
        f"{amount:g} {unit(name, amount)}"
        for name, amount in sorted(gang.per_rank.items(), reverse=True)
    ]
    ranks = "1 rank" if gang.ranks == 1 else f"{gang.ranks} ranks"
    nodes = ""
    if gang.max_nodes:
        nodes = f" on at most {gang.max_nodes} node{'s' if gang.max_nodes != 1 else ''}"
    return f"{ranks} x {' and '.join(parts)}{nodes}"


def unit(name: str, amount: float) -> str:
    """ "GPU" for one, "GPUs" for others; a custom resource keeps its name."""
    return f"{name}s" if name in ("CPU", "GPU") and amount != 1 else name
