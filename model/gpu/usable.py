"""Which of our Triton kernels run on this machine: each is tried once per process."""

from __future__ import annotations

from importlib import import_module

import torch

# Modules of `model.gpu` with kernels. Each has `trial() -> bool`: a small case against torch.
KERNELS = ("suppression", "matching", "roi_align", "neighbourhoods", "convolution", "mask")

tried: dict[str, str] = {}  # by module what `why_not` found, once per process


def why_not(kernel: str) -> str:
    """Why this module's kernels cannot be used here, in one line; empty where they can.

    Triton needs a C compiler and the headers of Python at run time, one version refuses what
    another compiles, and each says so with errors of other kinds. So each kernel is compiled and
    run on a small case, and whatever it raises is the reason.
    """
    if kernel not in tried:
        tried[kernel] = _tried(kernel)
    return tried[kernel]


def _tried(kernel: str) -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        right = import_module(f"model.gpu.{kernel}").trial()
    except Exception as error:  # noqa: BLE001 - any error means that training goes on without it
        lines = str(error).strip().splitlines()
        # Triton's compiler prints the source first and says what is wrong with it last.
        return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]
    return "" if right else "it computes other numbers than torch"


def kernels() -> str:
    """What computes on a GPU: "triton", its version and the kernels that it lacks, or "torch"."""
    missing = [name for name in KERNELS if why_not(name)]
    if len(missing) == len(KERNELS):
        return "torch"
    import triton

    without = f" without {', '.join(missing)}" if missing else ""
    return f"triton {triton.__version__}{without}"


def complaints() -> list[str]:
    """One line for each kernel that cannot be used: torch's own, slower path stands in for it."""
    return [
        f"no Triton kernel for {name.replace('_', ' ')} on this GPU, torch's stands in: {reason}"
        for name in KERNELS
        if (reason := why_not(name))
    ]
