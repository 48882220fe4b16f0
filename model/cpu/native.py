"""The C library of native.c and its operators for torch. Only this file knows ctypes.

`setup.py` compiles the library when maskray is installed; without gcc 12 or newer there is none.
Whoever calls a kernel asks `takes` first, and has torch's own operation for the other case.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 16  # channels that a kernel takes at a time, as in native.c

_ARGUMENTS = {  # p: pointer, l: long, d: double; the number of threads comes last
    "winograd_forward": "pplp lllll pl l",
    "winograd_weight_gradient": "ppp lllll pl l",
    "windows_forward": "ppp llll lllll l",
    "windows_input_gradient": "ppp llll lllll l",
    "windows_weight_gradient": "pppp llll lllll l",
    "group_norm_forward": "pppppp llll d l",
    "group_norm_backward": "ppppppp llll l",
    "bins_forward": "ppppppp llllll l",
    "bins_backward": "ppppppp llllll l",
    "nms": "pppp ll d l",
}
_TYPES: dict[str, type[ctypes.c_void_p | ctypes.c_long | ctypes.c_double]] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_long,
    "d": ctypes.c_double,
}

P = ParamSpec("P")
R = TypeVar("R")


class Context(Protocol):
    """What an operator keeps from its forward pass for its backward pass; torch makes it."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]  # numbers, by the operator that keeps them

    def save_for_backward(self, *tensors: Tensor) -> None: ...


Gradients = tuple[Tensor | None, ...]  # one for each argument of the operator


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("maskray_native")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        _warn(f"{spec.origin} cannot be loaded ({error})")
        return None
    library.native_source.restype = ctypes.c_uint
    # Code travels to the nodes, what was compiled stays where it is: the two may differ.
    if library.native_source() != source():
        _warn(
            f"{spec.origin} was compiled from another native.c than this code's; "
            "install maskray again"
        )
        return None
    for kernel, arguments in _ARGUMENTS.items():
        getattr(library, kernel).argtypes = [
            _TYPES[letter] for letter in arguments.replace(" ", "")
        ]
        getattr(library, kernel).restype = None
    return library


def source() -> int:
    """The checksum of the native.c beside this file; `setup.py` compiles the same one in."""
    return zlib.crc32(Path(__file__).with_name("native.c").read_bytes())


def _warn(reason: str) -> None:
    warnings.warn(f"{reason}: training on a CPU is slower", stacklevel=3)


_library = _load()
_thread = threading.local()


def available() -> bool:
    """Whether the kernels were compiled, from the native.c of this code."""
    return _library is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are there and compute with these tensors: plain fp32 on the CPU.

    Under autocast, `torch.compile` and tracing, torch computes by itself.
    """
    if _library is None or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    # A subclass (a fake or a traced tensor) has no memory of its own that a kernel could read.
    plain = torch._C._get_tracing_state() is None and all(
        type(tensor) in (Tensor, nn.Parameter) for tensor in tensors
    )
    return plain and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def register(
    schema: str,
    kernel: Callable[P, R],
    fake: Callable[..., R],
    keep: Callable[[Context, tuple[Tensor, ...], R], None] | None = None,
    backward: Callable[..., Gradients] | None = None,
) -> Callable[P, R]:
    """Makes `torch.ops.maskray.NAME` of a function that runs kernels, and returns it.

    schema: as `torch.library` reads it, "NAME(Tensor x, int stride) -> Tensor". fake: the shape of
    the result, for tracers. keep: saves for the backward pass. backward: the gradients; a second
    backward pass raises.
    """
    name, bracket, rest = schema.partition("(")
    torch.library.define(f"maskray::{name}", bracket + rest)
    torch.library.impl(f"maskray::{name}", "cpu", kernel)
    torch.library.register_fake(f"maskray::{name}", fake)
    if backward is not None:
        # The kernels of a backward pass have no gradients: unmarked, a second pass would take them
        # for constants.
        torch.library.register_autograd(
            f"maskray::{name}", once_differentiable(backward), setup_context=keep
        )
    return cast(Callable[P, R], getattr(torch.ops.maskray, name).default)


def run(kernel: str, *arguments: Tensor | int | float) -> None:
    """Runs one kernel on as many threads as torch uses.

    Tensors are dense in the order of their axes.
    """
    assert _library is not None
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(_library, kernel)(*values, torch.get_num_threads())


def workspace(numbers: int) -> Tensor:
    """At least so many floats for one kernel, the thread's own.

    They are kept, at the size of the largest: 0.23 GB after a stem's gradient on two images of 1344
    x 1344.
    """
    # Fresh memory for each kernel would cost too much: the system clears its pages first.
    buffer: Tensor | None = getattr(_thread, "workspace", None)
    if buffer is None or len(buffer) < numbers:
        buffer = _thread.workspace = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return buffer


def empty_maps(images: int, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised maps (N, C, H, W), channels last."""
    # No view of anything: a residual block adds to its maps in place, and autograd refuses that on
    # a view. The device is named, because a person may have set another default.
    shape = (images, channels, height, width)
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def cells(maps_NCHW: Tensor) -> Tensor:
    """(N, H, W, C), dense: a view of channels-last maps, a copy of others."""
    return maps_NCHW.permute(0, 2, 3, 1).contiguous()
