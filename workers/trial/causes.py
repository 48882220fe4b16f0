"""Why a rank ended badly: one line, a class that the orchestrator decides by, and an exit status."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from contract.attempt import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_STOPPED,
    OUTCOME_FILE,
    Outcome,
)
from contract.files import Files
from contract.words import one_line
from workers.trial.checkpoints import FencedError

ErrorClass = Literal["none", "person", "out_of_memory", "node", "collective", "diverged", "unknown"]
CAUSE_FILE = "attempts/{attempt}/rank-{rank}.cause.json"
# A rank whose peer died says so itself; the peer's own cause, where it left one, says more.
_TELLING: tuple[ErrorClass, ...] = (
    "person",
    "out_of_memory",
    "diverged",
    "unknown",
    "node",
    "collective",
    "none",
)
_PEER_LOST = (
    "connection closed by peer",
    "connection reset",
    "gloo",
    "nccl",
    "socket timeout",
    "broken pipe",
    "heartbeat",
)


class DivergedError(RuntimeError):
    """The loss left its range more often than the guard may roll back."""


class Cause(BaseModel):
    """How one rank failed. details: its traceback."""

    rank: int
    error_class: ErrorClass
    error: str
    details: str = ""


def cause_of(error: BaseException, rank: int) -> Cause:
    details = "".join(traceback.format_exception(error))
    return Cause(
        rank=rank, error_class=classify(error), error=f"{one_line(error)}"[:2000], details=details
    )


def classify(error: BaseException) -> ErrorClass:
    match error:
        case DivergedError():
            return "diverged"
        case FencedError():
            return "node"
        case torch.OutOfMemoryError() | OutOfMemoryError() | MemoryError():
            return "out_of_memory"
        case ValueError() | FileNotFoundError():
            return "person"
        case dist.DistBackendError() | dist.DistNetworkError() | ConnectionError():
            return "collective"
        case OSError():
            return "node"
        case RuntimeError():
            text = str(error).lower()
            if any(sign in text for sign in _PEER_LOST):
                return "collective"
            caused_by_disk = isinstance(error.__cause__, OSError) and error.__cause__.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
            )
            return "node" if caused_by_disk else "unknown"
        case _:
            return "unknown"


class OutOfMemoryError(RuntimeError):
    """A device ran out of memory; the message says on what and what to change."""


FEWER_IMAGES = "lower loop.max_images_per_forward (the gradients stay the same)"
FEWER_EVALUATED = "lower loop.eval_batch"


def explain_out_of_memory(
    images: Sequence[tuple[int, ...]], device: torch.device, remedy: str = FEWER_IMAGES
) -> OutOfMemoryError:
    """images: shapes (B, 3, H, W) of this rank's chunks of the step. remedy: what holds fewer of them at once."""
    shapes = ", ".join("x".join(str(side) for side in shape) for shape in images)
    total = (
        torch.cuda.get_device_properties(device).total_memory / 2**30
        if device.type == "cuda"
        else 0
    )
    size = f" ({total:.0f} GiB)" if total else ""
    return OutOfMemoryError(
        f"out of memory on {device}{size} with images of {shapes}; "
        f"{remedy}, choose loop.precision bf16, or use more ranks"
    )


@contextmanager
def memory_explained(
    images: Sequence[Tensor], device: torch.device, remedy: str = FEWER_IMAGES
) -> Iterator[None]:
    """Within the block running out of memory is told with the shapes of `images` and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_cpu = "can't allocate memory" in str(error)  # a plain RuntimeError of torch's allocator
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
            raise explain_out_of_memory(
                [tuple(chunk.shape) for chunk in images], device, remedy
            ) from error
        raise


def most_telling(causes: Sequence[Cause]) -> Cause:
    """The cause that explains the others."""
    return min(causes, key=lambda cause: (_TELLING.index(cause.error_class), cause.rank))


def record_cause(storage: Files, attempt: int, cause: Cause) -> None:
    storage.write(
        CAUSE_FILE.format(attempt=attempt, rank=cause.rank),
        cause.model_dump_json(indent=1).encode(),
    )


def recorded_causes(storage: Files, attempt: int) -> list[Cause]:
    folder = f"attempts/{attempt}"
    names = [name for name in storage.names(folder) if name.endswith(".cause.json")]
    return [Cause.model_validate_json(storage.read(f"{folder}/{name}")) for name in names]


def common_cause(storage: Files, attempt: int, own: Cause, patience_s: float = 3.0) -> Cause:
    """The most telling cause of all ranks; a rank that lost its peer waits a little for what the peer has to say."""
    until = time.monotonic() + patience_s
    while True:
        best = most_telling([own, *recorded_causes(storage, attempt)])
        if best.error_class != "collective" or time.monotonic() > until:
            return best
        time.sleep(0.1)


def write_outcome(storage: Files, attempt: int, outcome: Outcome) -> None:
    """Writes `outcome.json` of the attempt; a field at its default is left out."""
    text = outcome.model_dump_json(indent=1, exclude_defaults=True)
    storage.write(OUTCOME_FILE.format(attempt=attempt), text.encode())


def exit_status(outcome: Outcome) -> int:
    match outcome.state:
        case "done":
            return EXIT_DONE
        case "stopped":
            return EXIT_STOPPED
        case "preempted":
            return EXIT_PREEMPTED
    match outcome.error_class:
        case "person":
            return EXIT_INPUT
        case "diverged":
            return EXIT_DIVERGED
        case "out_of_memory":
            return EXIT_OUT_OF_MEMORY
        case _:
            return EXIT_FAILED
