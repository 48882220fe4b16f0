"""What the sections of `gpu_check.py` share: probes, sizes, and how a call is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from benchmarks.pairs import in_turns


@dataclass(frozen=True)
class Probe:
    """One question to the device. `call` answers it or raises."""

    name: str
    call: Callable[[], JsonValue]


@dataclass(frozen=True)
class Scale:
    """How large the probes are. canvas: height and width. calls: of a burst."""

    canvas: tuple[int, int]
    images: tuple[int, ...]
    objects: int
    calls: int
    bursts: int
    suppressed: tuple[int, ...]
    dry: bool

    @property
    def usual_images(self) -> int:
        return 8 if 8 in self.images else self.images[0]


FULL = Scale((800, 1344), (2, 4, 8, 16, 32), 32, 8, 3, (1, 33, 2000, 12000), dry=False)
DRY = Scale((128, 160), (2,), 4, 1, 1, (1, 33), dry=True)


def timed(calls: Mapping[str, Callable[[], object]], scale: Scale, per_burst: int = 0) -> JsonValue:
    """Milliseconds of each call, in turns; see `bursts_of`."""
    found = bursts_of(calls, scale, per_burst)
    return {name: value.told() for name, value in found.items()}


@dataclass(frozen=True)
class Timing:
    """Medians over the bursts. host_ms: until the call returned, waiting for the device or not."""

    ms: float
    host_ms: float

    def told(self) -> dict[str, JsonValue]:
        return {"ms": round(self.ms, 3), "host_ms": round(self.host_ms, 3)}


def bursts_of(
    calls: Mapping[str, Callable[[], object]], scale: Scale, per_burst: int = 0
) -> dict[str, Timing]:
    """Times bursts of each call in turns, after three calls to warm up.

    A burst ends with one wait for the device, as a training that never waits would run.
    """
    count = 1 if scale.dry else per_burst or scale.calls

    def burst(call: Callable[[], object]) -> Timing:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return Timing(1e3 * (time.perf_counter() - start) / count, 1e3 * host / count)

    for call in calls.values():
        for _ in range(1 if scale.dry else 3):
            call()
    found = in_turns({n: lambda c=c: burst(c) for n, c in calls.items()}, scale.bursts)
    return {
        name: Timing(
            statistics.median(t.ms for t in values), statistics.median(t.host_ms for t in values)
        )
        for name, values in found.items()
    }
