"""Whether our Triton kernels run in this process, decided once."""

from __future__ import annotations

from functools import cache

import torch


@cache
def why_not() -> str:
    """Why Triton cannot be used here, in one line; empty where it can.

    Triton needs a C compiler and the headers of Python at run time, and it says so with errors of
    many kinds. So one small kernel is compiled and run, and whatever it raises is the reason.
    """
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        from model.gpu.probe import doubled

        numbers = torch.arange(4, dtype=torch.float32, device="cuda")
        if not torch.equal(doubled(numbers).cpu(), 2 * numbers.cpu()):
            return "a kernel of Triton computed a wrong number"
    except Exception as error:  # noqa: BLE001 - any error means that training goes on without it
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]
    return ""


def kernels() -> str:
    """What computes on a GPU: "triton" and its version, or "torch"."""
    if why_not():
        return "torch"
    import triton

    return f"triton {triton.__version__}"
