"""Bytes, operations and a roofline of what runs on the null CUDA, by part.

An operation reads its arguments and writes its results once. What ours do inside counts, too: the
operations of torch in a library function of ours, and each Triton kernel with all tensors that it
gets, so that a fused kernel is cheaper by what it does not write, and not free. For a kernel that
reads a part of a tensor this is too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.parts import tensors_in

# What an H100 reaches, estimated: 3.35e12 bytes/s and 990e12 dense bf16 operations/s are its limits
BYTES_PER_S = 2.6e12
FLOPS_PER_S = {torch.bfloat16: 450e12, torch.float16: 450e12, torch.float32: 200e12}  # TF32
LEAST_S = 2.5e-6  # a kernel's least time
# torchvision's backward pass of RoIAlign took 112 ms for 6.6e9 atomic additions on an H200
ATOMICS_PER_S = 5.9e10

_TORCHS = ("aten", "prims", "prim", "torchvision", "profiler", "c10d")
_NO_WORK = {
    "_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "device",
    "new_empty_strided", "_local_scalar_dense", "set_", "record_stream",
}  # fmt: skip
_READS_NO_MORE_THAN_IT_WRITES = {"gather", "index", "index_select", "take"}
_WRITES_ONLY = {"zero_", "fill_", "zeros", "full", "ones", "new_zeros", "zeros_like", "arange"}


class Traffic(TorchDispatchMode):
    """Counts by the part that `now` names."""

    def __init__(self, now: Callable[[], str]) -> None:
        super().__init__()
        self.now = now
        self.bytes: Counter[str] = Counter()
        self.bytes_by_operation: Counter[tuple[str, str]] = Counter()
        self.flops: Counter[str] = Counter()
        self.atomics: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace not in _TORCHS:
            before = self.bytes.total()
            with _Inside(self):
                result = function(*args, **kwargs)
            if self.bytes.total() > before:
                return result
        else:
            result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if not is_view(function) and name not in _NO_WORK:
            arguments = [*args, *kwargs.values()]
            moved = bytes_moved(function, name, arguments, result)
            if name == "_roi_align_backward":
                self.atomics[self.now()] += 16 * args[0].numel()  # 2 x 2 samples of 4 cells each
            self.add(name, moved, *flops(name, args, result))
        return result

    def add(self, operation: str, moved: int, flop: int = 0, rate: float = 1.0) -> None:
        part = self.now()
        self.bytes[part] += moved
        self.bytes_by_operation[part, operation] += moved
        self.flops[part] += flop
        least = LEAST_S if moved else 0.0
        time = max(least, moved / BYTES_PER_S, flop / rate)
        self.seconds[part] = self.seconds.get(part, 0.0) + time

    @property
    def roofline_ms(self) -> float:
        return 1e3 * sum(self.seconds.values())

    @property
    def atomics_ms(self) -> float:
        return 1e3 * self.atomics.total() / ATOMICS_PER_S


class _Inside(TorchFunctionMode):
    """Counts what a library function of ours calls: inside of one, the dispatcher asks no mode."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        arguments, results = tensors_in([*args, *kwargs.values()]), tensors_in(result)
        known = {tensor.untyped_storage().data_ptr() for tensor in arguments}
        new = all(tensor.untyped_storage().data_ptr() not in known for tensor in results)
        name = getattr(function, "__name__", "")
        if results and name not in _NO_WORK and (new or name.endswith("_")):
            read = 0 if name in _WRITES_ONLY else size(arguments)
            self.traffic.add(name, read + size(results))
        return result


def is_view(function: Any) -> bool:
    """Whether an operation only looks at its argument in another way."""
    returns = function._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def size(tensors: list[Tensor]) -> int:
    """Bytes of the tensors on the device, each once; what `expand` repeats is read once."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cuda":
            count = 1
            for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= 1 if stride == 0 and length else length
            start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
            found[start] = max(found.get(start, 0), count * tensor.element_size())
    return sum(found.values())


def bytes_moved(function: Any, name: str, arguments: list[Any], result: Any) -> int:
    written = size(tensors_in(result))
    if not function._schema.returns:
        pairs = zip(function._schema.arguments, arguments, strict=False)
        changed = [v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write]
        written = size(tensors_in(changed))
    read = size(tensors_in(arguments))
    if name in _READS_NO_MORE_THAN_IT_WRITES:
        read = min(read, 2 * written)
    if name in _WRITES_ONLY:
        read = 0
    if name == "copy_":
        read = size(tensors_in(arguments[1]))
    if name == "roi_align" and not arguments[0].is_contiguous():
        read += 2 * size([arguments[0]])  # torchvision's kernel makes a contiguous copy
    return read + written


def flops(name: str, args: Any, result: Any) -> tuple[int, float]:
    """Multiplications and additions, and how many a second there can be."""
    if name in ("convolution", "cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        x, weight = args[0], args[1]
        positions = x if name == "convolution" and args[6] else result
        return 2 * positions.numel() * weight[0].numel(), FLOPS_PER_S[weight.dtype]
    if name == "convolution_backward":
        gradient, x, weight = args[:3]
        positions = x if args[7] else gradient
        passes = bool(args[10][0]) + bool(args[10][1])
        return 2 * positions.numel() * weight[0].numel() * passes, FLOPS_PER_S[weight.dtype]
    if name in ("mm", "addmm", "bmm"):
        left, right = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
        return 2 * left.numel() * right.shape[-1], FLOPS_PER_S.get(left.dtype, 50e12)
    return 0, 1.0


@contextmanager
def counted(traffic: Traffic) -> Iterator[None]:
    """Counts torch's operations and the Triton kernels, Inductor's among them."""
    kinds: list[Any] = []
    with suppress(ImportError):
        from triton.runtime.jit import JITFunction

        kinds.append(JITFunction)
    with suppress(ImportError):
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        kinds.append(CachingAutotuner)
    originals = [kind.run for kind in kinds]

    def patched(original: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup"):
                name = getattr(self.fn, "__name__", "kernel")
                traffic.add(f"triton {name}", size(tensors_in([*args, *kwargs.values()])))
            return original(self, *args, **kwargs)

        return run

    for kind, original in zip(kinds, originals, strict=True):
        kind.run = patched(original)
    try:
        with traffic:
            yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original
