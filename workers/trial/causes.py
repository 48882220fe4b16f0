"""Why a rank ended badly: one line, a class by which the service decides, and an exit status."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from contract.attempt import (
    CAUSE_FILE,
    OUTCOME_FILE,
    ErrorClass,
    ExitStatus,
    Outcome,
)
from contract.files import Files
from contract.record import Message
from contract.words import one_line
from workers.trial.checkpoints import FencedError

# The class that explains most comes first. A rank whose peer died only says that it lost the peer;
# the peer's own cause, where it left one, says why.
_BY_EXPLANATION: tuple[ErrorClass, ...] = (
    "person",
    "out_of_memory",
    "diverged",
    "unknown",
    "node",
    "collective",
    "none",
)
# gloo and NCCL raise plain RuntimeErrors: only their words set a lost peer apart from a bug
_PEER_LOST = (
    "connection closed by peer",
    "connection reset",
    "gloo",
    "nccl",
    "socket timeout",
    "broken pipe",
    "heartbeat",
)
_MOST_ERROR_CHARS = 2000


class DivergedError(RuntimeError):
    """The loss left its range more often than the guard may roll back."""


class Cause(Message):
    """How one rank failed. details: its traceback."""

    rank: int
    error_class: ErrorClass
    error: str
    details: str = ""


def cause_of(error: BaseException, rank: int) -> Cause:
    """What one rank knows of its own failure."""
    return Cause(
        rank=rank,
        error_class=classify(error),
        error=one_line(error)[:_MOST_ERROR_CHARS],
        details="".join(traceback.format_exception(error)),
    )


def classify(error: BaseException) -> ErrorClass:
    """The class of an error. The service decides by it who is at fault, and whether to retry."""
    match error:
        case DivergedError():
            return "diverged"
        case FencedError():
            return "node"
        # before RuntimeError, of which torch's two are kinds
        case torch.OutOfMemoryError() | OutOfMemoryError() | MemoryError():
            return "out_of_memory"
        # ValueError is what a person wrote, everywhere in maskray
        case ValueError() | FileNotFoundError():
            return "person"
        # before OSError, of which ConnectionError is one
        case dist.DistBackendError() | dist.DistNetworkError() | ConnectionError():
            return "collective"
        # a full disk and a store that does not answer among them
        case OSError():
            return "node"
        case RuntimeError():
            text = str(error).lower()
            if any(sign in text for sign in _PEER_LOST):
                return "collective"
            return "unknown"
        case _:
            return "unknown"


# --- out of memory ---


class OutOfMemoryError(RuntimeError):
    """A device ran out of memory; the message says on what and what to change."""


FEWER_IMAGES = "lower loop.max_images_per_forward (the gradients stay the same)"
FEWER_EVALUATED = "lower loop.eval_batch"


def explain_out_of_memory(
    images: Sequence[tuple[int, ...]], device: torch.device, remedy: str = FEWER_IMAGES
) -> OutOfMemoryError:
    """The error to raise in place of torch's.

    images: shapes (B, 3, H, W) of this rank's chunks of the step. remedy: how fewer of them are
    held at once.
    """
    shapes = ", ".join("x".join(str(side) for side in shape) for shape in images)
    size = ""
    if device.type == "cuda":
        size = f" ({torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"
    return OutOfMemoryError(
        f"out of memory on {device}{size} with images of {shapes}; "
        f"{remedy}, choose loop.precision bf16, or use more ranks"
    )


@contextmanager
def memory_explained(
    images: Sequence[Tensor], device: torch.device, remedy: str = FEWER_IMAGES
) -> Iterator[None]:
    """Within the block, running out of memory raises an error with shapes and a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_cpu = "can't allocate memory" in str(error)  # a plain RuntimeError of torch's allocator
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
            raise explain_out_of_memory(
                [tuple(chunk.shape) for chunk in images], device, remedy
            ) from error
        raise


# --- what one rank leaves for the others ---


def most_telling(causes: Sequence[Cause]) -> Cause:
    """The cause that explains the others."""
    # of equals the lowest rank, so that all ranks choose the same
    return min(causes, key=lambda cause: (_BY_EXPLANATION.index(cause.error_class), cause.rank))


def record_cause(storage: Files, attempt: int, cause: Cause) -> None:
    """Leaves a cause in the attempt's folder, for the other ranks and the driver."""
    path = CAUSE_FILE.format(attempt=attempt, rank=cause.rank)
    storage.write(path, cause.model_dump_json(indent=1).encode())


def recorded_causes(storage: Files, attempt: int) -> list[Cause]:
    """Every cause that a rank of this attempt left."""
    folder = f"attempts/{attempt}"
    names = [name for name in storage.names(folder) if name.endswith(".cause.json")]
    return [Cause.model_validate_json(storage.read(f"{folder}/{name}")) for name in names]


def common_cause(storage: Files, attempt: int, own: Cause, patience_s: float = 3.0) -> Cause:
    """The most telling cause of all ranks.

    A rank that lost its peer waits a little: the peer may still be writing its own cause.
    """
    until = time.monotonic() + patience_s
    while True:
        best = most_telling([own, *recorded_causes(storage, attempt)])
        # any other class explains the end of this rank, too
        if best.error_class != "collective" or time.monotonic() > until:
            return best
        time.sleep(0.1)


# --- what the attempt leaves for the service ---


def write_outcome(storage: Files, attempt: int, outcome: Outcome) -> None:
    """Writes `outcome.json` of the attempt; a field at its default is left out."""
    storage.write_json(OUTCOME_FILE.format(attempt=attempt), outcome.sparse())


def exit_status(outcome: Outcome) -> ExitStatus:
    """The exit status of a program that ends with this outcome."""
    match outcome.state:
        case "done":
            return ExitStatus.DONE
        case "stopped":
            return ExitStatus.STOPPED
        case "preempted":
            return ExitStatus.PREEMPTED
    match outcome.error_class:
        case "person":
            return ExitStatus.INPUT
        case "diverged":
            return ExitStatus.DIVERGED
        case "out_of_memory":
            return ExitStatus.OUT_OF_MEMORY
        case _:
            return ExitStatus.FAILED
