"""What torch, CUDA, cuDNN, cuBLAS, NCCL and gloo say, and the class that the service decides by.

The messages are those of people's bug reports: torch writes them, and no exception's type tells
them apart.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from contract.files import Files
from workers.trial.causes import Cause, causes_in_logs, most_telling
from workers.trial.checkpoints import FencedError
from workers.trial.errors import (
    OutOfMemoryError,
    cause_of,
    classify,
    explain_out_of_memory,
    memory_explained,
)

_TRAILER = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, {what}, "
    "NCCL version 2.27.3\n{name}: {meaning}\nLast error:\n{last}"
)
_UNHANDLED = {
    "what": "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "name": "ncclUnhandledCudaError",
    "meaning": "Call to CUDA function failed.",
}
_NCCL_LATE = (
    "WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, NumelOut=466119168, "
    "Timeout(ms)=600000) ran for 600060 milliseconds before timing out."
)

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
    RuntimeError("CUDA out of memory. Tried to allocate 10.01 GiB (GPU 0; 14.75 GiB total)"),
    RuntimeError("CUDA error: out of memory" + _TRAILER),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp"'
        ":1015, please report a bug to PyTorch. "
    ),
    dist.DistBackendError(_NCCL.format(**_UNHANDLED, last="Cuda failure 2 'out of memory'")),
    dist.DistBackendError(_NCCL.format(**_UNHANDLED, last="Cuda failure 'out of memory'")),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
]
NODE = [
    RuntimeError("CUDA error: uncorrectable ECC error encountered" + _TRAILER),
    RuntimeError("CUDA error: unspecified launch failure" + _TRAILER),
    RuntimeError("CUDA error: an illegal memory access was encountered" + _TRAILER),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable" + _TRAILER),
    RuntimeError("CUDA error: unknown error" + _TRAILER),  # a GPU that fell off the bus
    RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution" + _TRAILER),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    dist.DistBackendError(_NCCL.format(**_UNHANDLED, last="Cuda failure 999 'unknown error'")),
    dist.DistBackendError(
        _NCCL.format(**_UNHANDLED, last="Cuda failure 214 'uncorrectable ECC error encountered'")
    ),
]
COLLECTIVE = [
    dist.DistBackendError(_NCCL.format(**_UNHANDLED, last="Cuda failure 1 'invalid argument'")),
    dist.DistBackendError(
        _NCCL.format(
            what="remote process exited or there was a network error",
            name="ncclRemoteError",
            meaning="A call failed possibly due to a network error or a remote process exiting "
            "prematurely.",
            last="socketProgressOpt: Call to recv from 10.0.0.1<33759> failed : Connection reset "
            "by peer",
        )
    ),
    dist.DistBackendError(
        f"NCCL communicator was aborted on rank 1. Original reason for failure was: {_NCCL_LATE}"
    ),
    RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "
        "Timed out waiting 1800000ms for recv operation to complete"
    ),
    RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1"),
]
OURS = [
    RuntimeError("CUDA error: device-side assert triggered" + _TRAILER),
    RuntimeError("CUDA error: invalid configuration argument" + _TRAILER),
    RuntimeError("CUDA error: no kernel image is available for execution on the device" + _TRAILER),
    RuntimeError("CUDA error: operation not permitted when stream is capturing" + _TRAILER),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (OUT_OF_MEMORY, "out_of_memory"),
        (NODE, "node"),
        (COLLECTIVE, "collective"),
        (OURS, "unknown"),
    ],
)
def test_the_messages_of_a_gpu_fall_into_their_class(errors, expected):
    assert {str(error): classify(error) for error in errors} == {
        str(error): expected for error in errors
    }


def test_the_newer_type_of_a_cuda_error_changes_no_class():
    texts = [str(error) for error in [*NODE, *OURS] if str(error).startswith("CUDA error")]
    assert len(texts) > 8
    assert all(classify(torch.AcceleratorError(t)) == classify(RuntimeError(t)) for t in texts)


def test_a_broken_gpu_is_told_apart_from_other_lost_nodes():
    assert all(cause_of(error, 0).gpu_broke for error in NODE)
    others = [*OUT_OF_MEMORY, *COLLECTIVE, *OURS, OSError(28, "No space left on device")]
    assert not any(cause_of(error, 0).gpu_broke for error in others)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_a_full_memory_is_explained_whoever_says_it(error):
    with (
        pytest.raises(OutOfMemoryError, match=r"images of 2x3x8x8; lower loop\.max_images"),
        memory_explained([torch.zeros(2, 3, 8, 8)], torch.device("cpu")),
    ):
        raise error


def test_a_time_out_is_named_in_words():
    late = "NCCL's ALLREDUCE was not over after 10 minutes, its time-out: a rank hangs"
    assert cause_of(COLLECTIVE[2], 1).error.startswith(late)
    gloo = "gloo's recv was not over after 30 minutes, its time-out: a rank hangs"
    assert cause_of(COLLECTIVE[3], 1).error.startswith(gloo)


_PREFIX = "[rank{0}]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank {0}] "


def test_what_the_watchdog_left_in_a_log_is_the_cause_of_a_rank_that_it_ended(tmp_path):
    logs = {
        0: "step 7\n" + _PREFIX.format(0) + "Watchdog caught collective operation timeout: "
        f"{_NCCL_LATE}\nframe #0: c10::Error::Error\n",
        1: _PREFIX.format(1) + "Process group watchdog thread terminated with exception: "
        f"CUDA error: uncorrectable ECC error encountered{_TRAILER}",
        2: "step 7\nrank 2 ends: interrupted\n",
        3: "x" * 300_000 + "\n" + _PREFIX.format(3) + "Process group watchdog thread terminated "
        f"with exception: CUDA error: device-side assert triggered{_TRAILER}" + "frame\n" * 9000,
    }
    for rank, text in logs.items():
        (tmp_path / "attempts/4").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"attempts/4/rank-{rank}.log").write_text(text)
    causes = causes_in_logs(Files(str(tmp_path)), 4, range(5))  # rank 4 has no log
    assert [(cause.rank, cause.error_class) for cause in causes] == [
        (0, "collective"),
        (1, "node"),
        (3, "unknown"),
    ]
    assert causes[0].error.startswith("NCCL's ALLREDUCE was not over after 10 minutes")
    assert causes[1].error == "CUDA error: uncorrectable ECC error encountered"
    peers = [Cause(rank=5, error_class="collective", error="NCCL communicator was aborted")]
    assert most_telling([*causes[:2], *peers]) == causes[1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), "person"),
        (FencedError("x"), "node"),
        (OSError(5, "Input/output error"), "node"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "collective"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "unknown"),
        (KeyError("x"), "unknown"),
        (explain_out_of_memory([(8, 3, 800, 1344)], torch.device("cpu")), "out_of_memory"),
    ],
)
def test_errors_fall_into_classes_that_the_orchestrator_decides_by(error, expected):
    assert classify(error) == expected


def test_the_cause_of_a_rank_explains_better_than_its_peers_loss():
    lost = cause_of(RuntimeError("Connection closed by peer"), 0)
    own = cause_of(torch.OutOfMemoryError("CUDA out of memory"), 3)
    assert most_telling([lost, own]) == own
