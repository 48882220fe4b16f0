"""What failed ranks leave: a cause each, the most telling of them, an outcome, an exit status.

Nothing here imports torch: the driver of a trial reads causes and never computes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence

from contract.attempt import (
    CAUSE_FILE,
    LOG_FILE,
    OUTCOME_FILE,
    ErrorClass,
    ExitStatus,
    Outcome,
)
from contract.files import Files
from contract.record import Message

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
# gloo, NCCL, cuDNN and cuBLAS raise plain RuntimeErrors, and CUDA does before torch 2.8: only their
# words set a lost peer, a lost device and a full memory apart from a bug. All in lower case.
_PEER_LOST = (
    "connection closed by peer",
    "connection reset",
    "gloo",
    "nccl",
    "socket timeout",
    "broken pipe",
    "heartbeat",
)
_MEMORY_FULL = (
    "can't allocate memory",  # torch's allocator on the CPU
    "cuda out of memory",
    "cuda error: out of memory",  # outside torch's allocator: a context, pinned memory
    "cuda driver error: out of memory",
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    "_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    # torch asks NVML for the numbers of its own message, and a MIG instance does not answer
    "nvml_success == r internal assert failed",
)
# What a retry on another GPU repeats: a mistake of the program, not of the device.
_OURS = (
    "device-side assert",
    "invalid argument",
    "invalid configuration argument",
    "invalid device",
    "invalid resource handle",
    "invalid_value",
    "misaligned address",
    "no kernel image",
    "not_supported",
    "too many resources requested",
    "captur",  # a call that a CUDA graph cannot hold
)
_CUDA_ERROR = re.compile(r"cuda(?: driver)? error: (.*)|cuda failure \d* ?'([^']*)'")
_DEVICE_LOST = ("uncorrectable", "unknown error")  # of those that NCCL passes on
_NCCL_LATE = re.compile(r"OpType=(\w+).*?Timeout\(ms\)=(\d+)")
_GLOO_LATE = re.compile(r"Timed out waiting (\d+)ms for (\w+) operation")
# The watchdog of NCCL ends its process past every handler: its line in the log is all that is left.
_WATCHDOG = re.compile(
    r"(Watchdog caught collective operation timeout: .*)"
    r"|watchdog thread terminated with exception: (.*)"
)
_LOG_TAIL_BYTES = 256 << 10  # the watchdog's line comes before a stack of every thread
_MOST_ERROR_CHARS = 2000


class Cause(Message):
    """How one rank failed. details: its traceback."""

    rank: int
    error_class: ErrorClass
    error: str
    details: str = ""

    @property
    def gpu_broke(self) -> bool:
        return self.error_class == "node" and "cuda" in self.error.lower()


def in_words(text: str) -> str:
    """An error's own line; a collective's time-out in words, which torch hides among numbers."""
    late = _NCCL_LATE.search(text)
    if late and ("timeout" in text.lower() or "timed out" in text.lower()):
        return _late("NCCL", late[1], int(late[2]))
    late = _GLOO_LATE.search(text)
    if late:
        return _late("gloo", late[2], int(late[1]))
    return text[:_MOST_ERROR_CHARS]


def _late(backend: str, operation: str, milliseconds: int) -> str:
    return (
        f"{backend}'s {operation} was not over after {milliseconds / 60_000:g} minutes, its "
        "time-out: a rank hangs, or is as far behind the others; the ranks' logs say which"
    )


def class_of_words(text: str) -> ErrorClass:
    """The class of an error of torch, CUDA or a collective by its message."""
    text = text.lower()
    # first: NCCL, cuDNN and cuBLAS run out of memory, too
    if any(sign in text for sign in _MEMORY_FULL):
        return "out_of_memory"
    cuda = _CUDA_ERROR.search(text)
    if cuda:
        what = cuda[1] or cuda[2]
        if cuda[1] is not None:
            # ECC, a GPU off the bus, a launch that failed: the device or its driver
            return "unknown" if any(sign in what for sign in _OURS) else "node"
        if any(sign in what for sign in _DEVICE_LOST):
            return "node"
    return "collective" if any(sign in text for sign in _PEER_LOST) else "unknown"


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


def causes_in_logs(storage: Files, attempt: int, ranks: Iterable[int]) -> list[Cause]:
    """What the watchdog of NCCL wrote into the logs of ranks that left no cause themselves."""
    causes = []
    for rank in ranks:
        path = LOG_FILE.format(attempt=attempt, rank=rank)
        size = storage.size(path) or 0
        tail = storage.read_part(path, max(size - _LOG_TAIL_BYTES, 0)) if size else None
        # the first line: what comes after it is a consequence
        said = _WATCHDOG.search((tail or b"").decode(errors="replace"))
        if said:
            text = said[1] or said[2]
            causes.append(
                Cause(rank=rank, error_class=class_of_words(f"nccl {text}"), error=in_words(text))
            )
    return causes


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
