"""The machine itself: versions and settings, copies to the device, NCCL."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import JsonValue

from benchmarks.gpu.probes import Probe, Scale, timed
from model.gpu.usable import complaints, kernels

_SMI = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,mig.mode.current,memory.total"


def environment(scale: Scale) -> Iterator[Probe]:  # noqa: ARG001 - all sections take it
    yield Probe("machine", _machine)
    yield Probe("settings", _settings)
    yield Probe("triton", lambda: {"kernels": kernels(), "missing": list(complaints())})
    yield Probe("nvidia-smi", _smi)


def _machine() -> JsonValue:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "gib": round(gpu.total_memory / 2**30, 1),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "python_h": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "gcc": shutil.which("gcc") or "",
        "bf16_native": torch.cuda.is_bf16_supported(including_emulation=False),
        **{name: _version(name) for name in ("torch", "torchvision", "triton", "numpy")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _settings() -> JsonValue:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn_tf32": cudnn.allow_tf32,
        "matmul_tf32": matmul.allow_tf32,
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "bf16_reduced_precision_reduction": bool(matmul.allow_bf16_reduced_precision_reduction),
        "alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def _smi() -> JsonValue:
    if not shutil.which("nvidia-smi"):
        return "not here"
    asked = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=15).stdout.strip()


def copies(scale: Scale) -> Iterator[Probe]:
    height, width = scale.canvas
    pixels = torch.empty(scale.usual_images * height * width * 3, dtype=torch.uint8)

    def both() -> JsonValue:
        pinned, there = pixels.pin_memory(), torch.empty_like(pixels, device="cuda")
        found = timed(
            {
                "pageable": lambda: there.copy_(pixels, non_blocking=True),
                "pinned": lambda: there.copy_(pinned, non_blocking=True),
            },
            scale,
        )
        assert isinstance(found, dict)
        return {**found, "bytes": pixels.numel()}

    yield Probe("host to device", both)


# one rank per GPU; r50-fpn has 44 million parameters
_ALL_REDUCE = """
import os, time, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
values = torch.zeros(44_000_000, device="cuda")
for number in range(25):
    if number == 5:
        torch.cuda.synchronize()
        began = time.perf_counter()
    dist.all_reduce(values)
torch.cuda.synchronize()
if rank == 0:
    print(1e3 * (time.perf_counter() - began) / 20)
dist.destroy_process_group()
"""


def nccl(scale: Scale) -> Iterator[Probe]:
    """On one GPU it shows no more than that NCCL starts and ends."""

    def all_reduce() -> JsonValue:
        ranks = torch.cuda.device_count()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, "--no-python", sys.executable, "-c", _ALL_REDUCE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-400:])
        return {"ranks": ranks, "ms": round(float(done.stdout.split()[-1]), 3)}

    # the null CUDA is one process
    if not scale.dry:
        yield Probe("all_reduce of 44 million fp32", all_reduce)
