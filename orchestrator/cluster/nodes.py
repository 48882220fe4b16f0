"""The nodes of a cluster as the queue sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    id: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """A node as Ray's state API names it."""

    id: str
    address: str
    is_head: bool
