"""The divergence guard: decisions on losses that have already reached the host, as values that the loop acts on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from contract.recipe import Guard

_MEMORY = 0.98  # of the running mean, per step
_PATIENCE = 20  # steps before a spike can be told from a beginning


@dataclass(frozen=True)
class GuardState:
    """mean: running mean of the total loss over `seen` steps. rollbacks: so far in the run.

    rate: factor on the learning rate. skipped: global batches that were passed over, all told.
    returned_to: step of the checkpoint that the last rollback went back to, -1 before the first.
    """

    mean: float = 0.0
    seen: int = 0
    rollbacks: int = 0
    rate: float = 1.0
    skipped: int = 0
    returned_to: int = -1


def judge(cfg: Guard, state: GuardState, losses: Sequence[float]) -> tuple[GuardState, int | None]:
    """The state after the total losses of consecutive steps, and the index of the first bad one, if any."""
    mean, seen = state.mean, state.seen
    for index, loss in enumerate(losses):
        spiked = seen >= _PATIENCE and loss > cfg.spike_factor * mean
        if not math.isfinite(loss) or spiked:
            return replace(state, mean=mean, seen=seen), index
        memory = min(_MEMORY, seen / (seen + 1))
        mean, seen = memory * mean + (1 - memory) * loss, seen + 1
    return replace(state, mean=mean, seen=seen), None


def rolled_back(
    cfg: Guard, at_checkpoint: GuardState, now: GuardState, step: int, reached: int
) -> GuardState:
    """The state to go on with from the checkpoint of `step`, when a step up to `reached` was bad."""
    state = replace(
        at_checkpoint,
        rollbacks=now.rollbacks + 1,
        rate=now.rate,
        skipped=now.skipped,
        returned_to=step,
    )
    if cfg.action == "skip_window":
        return replace(state, skipped=state.skipped + reached - step)
    return replace(state, rate=state.rate * cfg.rate_factor)
