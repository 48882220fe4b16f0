"""Programs on a CUDA that computes nothing (null_cuda.c), for tests without a GPU.

torch runs its own eager dispatch, autograd, caching allocator and DDP on it, and Triton compiles.
Launches, waits of the host, copies and memory are exact; values mean nothing: what no copy wrote
is zero. cuDNN's convolutions are taken over here. Profiling (CUPTI) does not work, and two
processes know nothing of each other.

    null_cuda.run([sys.executable, "program.py"])   # from outside: builds, sets the environment
    null_cuda.install()                             # inside: before the first convolution
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from model.gpu import usable

SOURCE = Path(__file__).with_name("null_cuda.c")
_LIBRARY = "libcuda.so.1"  # Triton opens it by this name
_USERS = ("libtorch_cuda", "libtorch_python", "libc10_cuda", "libcaffe2_nvrtc", "libtorch_nvshmem")
_PREFIXES = ("cuda", "__cuda", "cu", "cublas", "nccl", "cudnn")
# these answer truly without a device
_OWN = ("cuFile", "ncclGetVersion", "cublasLtGetVersion", "cudnnGet", "cupti")
# what Triton and torch look up by name at run time
_LOOKED_UP = {
    "cuCtxSetCurrent", "cuCtxGetLimit", "cuCtxSetLimit", "cuFuncSetAttribute",
    "cuFuncSetCacheConfig", "cuModuleUnload", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col",
    "cuLibraryLoadData",
}  # fmt: skip


def why_not() -> str:
    """Why programs cannot run on the null CUDA here, in one line; empty where they can."""
    if sys.platform != "linux":
        return "the null CUDA is loaded by Linux's dynamic linker"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    missing = [tool for tool in ("gcc", "nm", "c++filt") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if find_spec("triton") is None:
        return "triton is not installed, which carries CUDA's headers"
    return ""


@cache
def build() -> Path:
    """The folder of the library, built once for this source and this torch."""
    facts = SOURCE.read_bytes() + Path(__file__).read_bytes() + torch.__version__.encode()
    key = hashlib.sha256(facts + str(_packages()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"maskray-null-cuda-{os.getuid()}" / key
    if not folder.exists():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _compile(Path(made))
            # another process may have been as fast
            if not folder.exists():
                shutil.copytree(made, folder.with_suffix(f".{os.getpid()}"))
                folder.with_suffix(f".{os.getpid()}").rename(folder)
    return folder


def _packages() -> Path:
    return Path(torch.__file__).parents[1]


def _compile(folder: Path) -> None:
    headers = _packages() / "triton/backends/nvidia/include"
    flags = ["gcc", "-w", "-O1", "-fPIC", "-I", str(headers)]
    ours, stubs = folder / "null_cuda.o", folder / "stubs.c"
    _call([*flags, "-c", str(SOURCE), "-o", str(ours)])
    defined = set(_call(["nm", "--defined-only", "--format=just-symbols", str(ours)]).split())
    names = sorted(_wanted() - defined)
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    linked = ["-shared", f"-Wl,-soname,{_LIBRARY}", "-o", str(folder / _LIBRARY)]
    _call([*flags, *linked, str(ours), str(stubs), "-ldl", "-lpthread"])


def _wanted() -> set[str]:
    """Every function of CUDA that torch and torchvision call."""
    libraries = [_packages() / "torch/lib" / f"{name}.so" for name in _USERS]
    libraries += (_packages() / "torchvision").glob("*.so")
    present = [str(path) for path in libraries if path.exists()]
    told = _call(["nm", "-D", "--undefined-only", "--format=just-symbols", *present])
    symbols = {word.split("@")[0] for word in told.split()}
    ours = {s for s in symbols if s.startswith(_PREFIXES) and not s.startswith(_OWN)}
    return ours | _LOOKED_UP


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()[:500]}")
    return done.stdout


def environment(devices: int = 1) -> dict[str, str]:
    """This process's environment, and what loads the null CUDA in a child."""
    folder = build()
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / _LIBRARY),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "NULL_CUDA_DEVICES": str(devices),
        "OMP_NUM_THREADS": "1",
    }


def run(command: Sequence[str], timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )


def loaded() -> bool:
    """Whether this process runs on the null CUDA."""
    return "maskray-null-cuda" in os.environ.get("LD_PRELOAD", "")


def load() -> None:
    """Starts this program anew on the null CUDA, unless it runs there already."""
    if not loaded():
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())


# --- in a process on the null CUDA ----------------------------------------------------------------


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    library.null_launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return library


FIGURES = (
    "launches", "triton", "products", "collectives", "device_copies", "fills",
    "pageable_copies", "pinned_copies", "copies_to_host", "pageable_to_host",
    "bytes_to_device", "bytes_to_host", "stream_waits", "event_waits", "earlier_event_waits",
    "device_waits", "blocking_copies", "mallocs", "host_allocs", "captured", "beside_capture",
    "graph_launches", "graph_nodes",
)  # fmt: skip


def figures() -> dict[str, int]:
    """Since the last `reset`. `captured` became nodes of a graph, `beside_capture` did not."""
    return {n: ctypes.c_ulong.in_dll(_library(), f"null_{n}").value for n in FIGURES}


def operations(found: Mapping[str, int]) -> int:
    """What the host has given the device to do: launches, copies on the device, and fills."""
    return found["launches"] + found["device_copies"] + found["fills"] + found["graph_launches"]


def waits(found: Mapping[str, int]) -> int:
    """How often the host has waited for the device. A pageable copy to it waits by itself.

    Waiting for an event from before the last `reset` does not count: what came after it is still
    there to be computed.
    """
    names = ("stream_waits", "event_waits", "device_waits", "blocking_copies")
    return sum(found[name] for name in names)


def reset() -> None:
    _library().null_reset()


def keep_values(keep: bool) -> None:
    """Lets what a copy wrote be read back. DDP's first step compares such numbers."""
    ctypes.c_int.in_dll(_library(), "null_keep").value = keep


def kernels() -> Counter[str]:
    """How often each kernel was launched, by its C++ name."""
    with tempfile.NamedTemporaryFile("r") as file:
        _library().null_dump(file.name.encode())
        rows = [line.rstrip("\n").split("\t") for line in file]
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for _, name in rows), text=True, capture_output=True
    ).stdout.splitlines()
    counted: Counter[str] = Counter()
    for (count, _), name in zip(rows, names, strict=True):
        counted[name] += int(count)
    return counted


class Event(IntEnum):
    """As null_cuda.c numbers them. A copy from or to pageable memory waits for the device."""

    OPERATION = 0
    WAIT = 1
    HOST_COPY = 2
    PAGEABLE_COPY = 3
    MEMORY = 4
    REFUSAL = 5


@contextmanager
def watched(call: Callable[[Event, str], None]) -> Iterator[None]:
    """Calls `call` with each event and its name, in the thread in which it happens."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_ulong)
    hook = kind(lambda event, what, _bytes: call(Event(event), what.decode()))
    slot = ctypes.c_void_p.in_dll(_library(), "null_hook")
    slot.value = ctypes.cast(hook, ctypes.c_void_p).value
    try:
        yield
    finally:
        slot.value = None


# --- cuDNN ----------------------------------------------------------------------------------------

_LAST = torch.channels_last
_implementations = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def install() -> None:
    """Takes over the operations that torch gives to cuDNN, and lets our kernels be used."""
    _library()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, function in _CUDNN.items():
            _implementations.impl(name, function, "CUDA")  # type: ignore[no-untyped-call]
    _trust_kernels()


def _trust_kernels() -> None:
    """Our Triton kernels count as right where they compile and run: values mean nothing here."""
    for name in usable.KERNELS:
        # whatever a trial raises, `usable.why_not` says it when it is asked
        with suppress(Exception):
            import_module(f"model.gpu.{name}").trial()
            usable.tried[name] = ""


def _launch(name: str) -> None:
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    library = _library()
    library.null_name(key := _key(name))
    if library.null_launch(key, stream):
        raise RuntimeError(f"CUDA error: {name}: operation failed due to a previous error")


@cache
def _key(name: str) -> bytes:
    return name.encode()


def _layout(*tensors: Tensor) -> torch.memory_format:
    """Channels last if any operand is so, as cuDNN chooses."""
    if any(t.is_contiguous(memory_format=_LAST) and not t.is_contiguous() for t in tensors):
        return _LAST
    return torch.contiguous_format


def _convolved(
    name: str, x: Tensor, w: Tensor, padding: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int]
) -> Tensor:  # fmt: skip
    layout = _layout(x, w)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    _launch(name)
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, s, d, k in zip(
            x.shape[2:], padding, stride, dilation, w.shape[2:], strict=True
        )
    ]
    return torch.empty(
        x.shape[0], w.shape[0], *sides, dtype=x.dtype, device=x.device, memory_format=layout
    )


def _convolution(x, w, padding, stride, dilation, groups, *_):  # type: ignore[no-untyped-def]
    return _convolved("convolution", x, w, padding, stride, dilation)


def _fused(x, w, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return _convolved("convolution_relu", x, w, padding, stride, dilation)


def _fused_sum(x, w, z, alpha, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    z.contiguous(memory_format=_layout(x, w))
    return _convolved("convolution_add_relu", x, w, padding, stride, dilation)


def _transposed(x, w, padding, output_padding, stride, dilation, groups, *_):  # type: ignore[no-untyped-def]
    layout = _layout(x, w)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    _launch("convolution")
    sides = [
        (side - 1) * s - 2 * p + d * (k - 1) + more + 1
        for side, s, p, d, k, more in zip(
            x.shape[2:], stride, padding, dilation, w.shape[2:], output_padding, strict=True
        )
    ]
    shape = (x.shape[0], w.shape[1] * groups, *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _backward(g, x, w, sizes, stride, padding, dilation, transposed, more, groups, mask):  # type: ignore[no-untyped-def]
    layout = _layout(x, w)
    g = g.contiguous(memory_format=_layout(x)).contiguous(memory_format=layout)
    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    to_input = to_weight = to_bias = None
    if mask[0]:
        _launch("convolution_backward_input")
        to_input = torch.empty_like(x, memory_format=layout)
    if mask[1]:
        _launch("convolution_backward_weight")
        to_weight = torch.empty_like(w, memory_format=layout)
    if mask[2]:
        to_bias = g.sum((0, 2, 3))
    return to_input, to_weight, to_bias


def _batch_norm(x, *_):  # type: ignore[no-untyped-def]
    _launch("batch_norm")
    statistics = (torch.empty(x.shape[1], device=x.device) for _ in range(2))
    return torch.empty_like(x), *statistics, torch.empty(0, dtype=torch.uint8, device=x.device)


_CUDNN = {
    "cudnn_convolution": _convolution,
    "cudnn_convolution_relu": _fused,
    "cudnn_convolution_add_relu": _fused_sum,
    "cudnn_convolution_transpose": _transposed,
    "convolution_backward": _backward,
    "cudnn_batch_norm": _batch_norm,
}
