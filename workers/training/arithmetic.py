"""The arithmetic of a run: in which precision its device really computes, and what cuDNN may do."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from contract.recipe import GpuArithmetic, LoopConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(loop: LoopConfig, device: torch.device) -> None:
    """Raises ValueError if the device cannot compute in the configured precision."""
    # Without the flag torch counts what it emulates: a V100 and a T4 would pass, and crawl.
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if loop.precision == "bf16" and not native:
        raise ValueError(
            f"loop.precision: {gpu_name(device)} has no bf16, which torch would emulate, slower "
            "than fp32; choose 'fp16' (with loss scaling) or 'fp32'"
        )
    if loop.eval_precision == "bf16" and not native:
        raise ValueError(
            f"loop.eval_precision: {gpu_name(device)} has no bf16, which torch would emulate, "
            "slower than fp32; choose 'fp32'"
        )


def doubts(loop: LoopConfig, device: torch.device) -> list[str]:
    """Warnings about settings that the device only imitates, or that have no effect on it."""
    if device.type != "cpu":
        return []
    slow = slow_precision(loop, device)
    idle = "loop.gpu: has no effect on a CPU" if loop.gpu != GpuArithmetic() else ""
    eager = "loop.cuda_graphs: has no effect on a CPU" if loop.cuda_graphs else ""
    return [text for text in (slow, idle, eager) if text]


def slow_precision(loop: LoopConfig, device: torch.device) -> str:
    """A warning about a precision that the CPU only imitates; empty if there is none to give.

    On a CPU without AVX-512 `tiny` trained at 1.7 images/s in bf16, 23.5 in fp32 (docs/log.md).
    """
    if device.type != "cpu" or loop.precision == "fp32" or _cpu_computes_in(loop.precision):
        return ""
    return f"loop.precision: this CPU imitates {loop.precision}, far slower than 'fp32' is"


def _cpu_computes_in(precision: Literal["bf16", "fp16"]) -> bool:
    """True also where torch does not say: the question is private, and only a warning needs it."""
    answer = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return answer is None or bool(answer())


def set_arithmetic(loop: LoopConfig, device: torch.device) -> None:
    """Tells cuBLAS and cuDNN what this process may do from now on; a CPU has no such choices."""
    if device.type != "cuda":
        return
    with warnings.catch_warnings():
        # torch 2.9 advises against these names. It has new ones, `fp32_precision`, but once those
        # are set the old ones raise, and Inductor reads the old ones (2.15: kernel/bmm.py). Set by
        # the old names, both give the same answer.
        warnings.filterwarnings("ignore", "Please use the new API settings", UserWarning)
        torch.backends.cudnn.allow_tf32 = loop.gpu.tf32_convolutions
        torch.backends.cuda.matmul.allow_tf32 = loop.gpu.tf32_products
    torch.backends.cudnn.benchmark = loop.gpu.cudnn_benchmark
    torch.backends.cudnn.deterministic = loop.gpu.cudnn_deterministic


def in_words(loop: LoopConfig, device: torch.device) -> str:
    """What the run computes in on this device, for its result: "bf16", "fp32 (imitated)", ..."""
    details = ["imitated"] if slow_precision(loop, device) else []
    if device.type == "cuda":
        if loop.precision == "fp32" and torch.cuda.is_tf32_supported():
            rounded = {
                "convolutions": loop.gpu.tf32_convolutions,
                "products": loop.gpu.tf32_products,
            }
            details += [f"{name} in TF32" for name, tf32 in rounded.items() if tf32]
        details += ["cuDNN timed its algorithms"] if loop.gpu.cudnn_benchmark else []
        details += ["cuDNN repeats to the bit"] if loop.gpu.cudnn_deterministic else []
    # training in bf16 and scores from fp32 are the common case, and need no words
    details += ["evaluated in bf16"] if loop.eval_precision == "bf16" else []
    return f"{loop.precision} ({', '.join(details)})" if details else loop.precision


def native_precisions(device: torch.device) -> list[str]:
    """The precisions that a GPU has units for, the most exact first."""
    major = torch.cuda.get_device_capability(device)[0]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    tf32 = torch.cuda.is_tf32_supported()
    fp16 = major >= 7  # the first with tensor cores: V100
    known = {"fp32": True, "TF32": tf32, "bf16": bf16, "fp16": fp16}
    return [name for name, native in known.items() if native]


def gpu_name(device: torch.device) -> str:
    """ "Tesla T4 (compute capability 7.5)"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
