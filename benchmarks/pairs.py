"""What the benchmarks share: they run in turns, so that a drift of the machine meets all alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def in_turns(
    calls: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 0
) -> dict[str, list[T]]:
    """Makes each call once a round. Returns what each returned, without the `warm_up` rounds."""
    values: dict[str, list[T]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            value = call()
            if number >= warm_up:
                values[name].append(value)
    return values


def seconds(
    call: Callable[[], object], finish: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """Wraps `call` to return its seconds. `finish` waits for a device."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        finish()
        return time.perf_counter() - start

    return timed


def report(
    name: str, rates: Mapping[str, list[float]], device: str, as_json: bool, **more: Any
) -> None:
    """Prints the medians of the rates "ours" and "peer" (more is better) and their ratio.

    The last line is a JSON object.
    """
    ours, peer = statistics.median(rates["ours"]), statistics.median(rates["peer"])
    pairs = len(rates["ours"])
    result = {
        "name": name,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "ratio": round(ours / peer, 3),
    }
    if not as_json:
        print(
            f"{name}: ours {result['ours']}, peer {result['peer']}, "
            f"ratio {result['ratio']} ({pairs} pairs)"
        )
    print(json.dumps({**result, "device": device, "pairs": pairs, **more}))
