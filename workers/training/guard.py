"""The divergence guard: decisions on losses that have reached the host, returned as values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from contract.recipe import Guard

_MEMORY = 0.98  # of the running mean, per step
_PATIENCE_STEPS = 20  # before them the mean has not settled, and any start looks like a spike


@dataclass(frozen=True)
class GuardState:
    """mean: running mean of the total loss over `seen` steps. rollbacks: so far in the run.

    rate: factor on the learning rate. skipped: global batches that were passed over so far.
    returned_to: step of the checkpoint that the last rollback went back to, -1 before the first.
    """

    mean: float = 0.0
    seen: int = 0
    rollbacks: int = 0
    rate: float = 1.0
    skipped: int = 0
    returned_to: int = -1


def first_bad_step(
    cfg: Guard, state: GuardState, losses: Sequence[float]
) -> tuple[GuardState, int | None]:
    """The state after the total losses of consecutive steps, and the index of the first bad one.

    The index is None if all of them are good. A bad loss does not enter the mean.
    """
    mean, seen = state.mean, state.seen
    for index, loss in enumerate(losses):
        spiked = seen >= _PATIENCE_STEPS and loss > cfg.spike_factor * mean
        if not math.isfinite(loss) or spiked:
            return replace(state, mean=mean, seen=seen), index
        # a plain mean at first: a fixed memory would keep the weight of the first loss for long
        memory = min(_MEMORY, seen / (seen + 1))
        mean, seen = memory * mean + (1 - memory) * loss, seen + 1
    return replace(state, mean=mean, seen=seen), None


def rolled_back(
    cfg: Guard, at_checkpoint: GuardState, now: GuardState, step: int, reached: int
) -> GuardState:
    """The state to go on with from the checkpoint of `step`, if a step up to `reached` was bad."""
    # the running mean is the checkpoint's; what the rollbacks did so far is not forgotten with it
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
