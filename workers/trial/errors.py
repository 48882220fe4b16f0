"""Errors of a rank: the class by which the service decides, and one line with a remedy."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from contract.attempt import ErrorClass
from contract.words import one_line
from workers.trial.causes import Cause, class_of_words, in_words
from workers.trial.checkpoints import FencedError

_LET_WRITE = "let this user write there, or name another folder"
_REMEDIES = {
    errno.EACCES: _LET_WRITE,
    errno.EPERM: _LET_WRITE,
    errno.EROFS: _LET_WRITE,
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class DivergedError(RuntimeError):
    """The loss left its range more often than the guard may roll back."""


def cause_of(error: BaseException, rank: int) -> Cause:
    """What one rank knows of its own failure."""
    return Cause(
        rank=rank,
        error_class=classify(error),
        error=in_words("; ".join(filter(None, (one_line(error), environment_remedy(error))))),
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
        case ConnectionError():
            return "collective"
        # a full disk and a store that does not answer among them
        case OSError():
            return "person" if environment_remedy(error) else "node"
        case RuntimeError():
            known = class_of_words(str(error))
            lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
            return "collective" if lost and known == "unknown" else known
        case _:
            return "unknown"


def environment_remedy(error: BaseException) -> str:
    """What a person can set against an error of their environment, which no retry changes.

    Empty for any other error.
    """
    if not isinstance(error, OSError):
        return ""
    if "AF_UNIX path too long" in str(error):  # Python's own words, without an errno
        return "set TMPDIR to a short path"
    return _REMEDIES.get(error.errno or 0, "")


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
    precision = "bf16"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "fp16"  # V100, T4: bf16 would be refused
    return OutOfMemoryError(
        f"out of memory on {device}{size} with images of {shapes}; "
        f"{remedy}, choose loop.precision {precision}, or use more ranks"
    )


@contextmanager
def memory_explained(
    images: Sequence[Tensor], device: torch.device, remedy: str = FEWER_IMAGES
) -> Iterator[None]:
    """Within the block, running out of memory raises an error with shapes and a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if classify(error) == "out_of_memory":
            raise explain_out_of_memory(
                [tuple(chunk.shape) for chunk in images], device, remedy
            ) from error
        raise
