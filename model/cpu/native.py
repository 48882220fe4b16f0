"""The kernels of native.c, for tensors. Installing maskray compiles them; without gcc 12 or newer there are none.

Whoever calls one asks `takes` first, and has torch's own operation for where there is none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

LANES = 16  # channels that a kernel takes at a time

_ARGUMENTS = {  # p: pointer, l: long, d: double; last comes the number of threads
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
    if library.native_source() != source():
        _warn(
            f"{spec.origin} was compiled from another native.c than this code's; install maskray again"
        )
        return None
    for kernel, arguments in _ARGUMENTS.items():
        getattr(library, kernel).argtypes = [
            _TYPES[letter] for letter in arguments.replace(" ", "")
        ]
        getattr(library, kernel).restype = None
    return library


def source() -> int:
    """A checksum of native.c beside this file: code travels to the nodes, what was compiled stays where it is."""
    lines = Path(__file__).with_name("native.c").read_bytes().splitlines(keepends=True)
    return zlib.crc32(
        b"".join(line for line in lines if not line.startswith(b"unsigned native_source"))
    )


def _warn(reason: str) -> None:
    warnings.warn(f"{reason}: training on a CPU is slower", stacklevel=3)


_library = _load()
_thread = threading.local()


def available() -> bool:
    return _library is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are there, and these are for them: fp32 on the CPU, computed as such and not compiled."""
    if _library is None or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    plain = torch._C._get_tracing_state() is None and all(
        type(tensor) in (Tensor, nn.Parameter) for tensor in tensors
    )
    return plain and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors
    )


def run(kernel: str, *arguments: Tensor | int | float) -> None:
    """One kernel on as many threads as torch takes. Tensors are dense in the order in which they are given."""
    assert _library is not None
    given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(_library, kernel)(*given, torch.get_num_threads())


def workspace(numbers: int) -> Tensor:
    """At least so many floats for one kernel, the thread's own: the pages of fresh memory would cost too much.

    It is kept, at the size of the largest: 0.23 GB after a stem's gradient on two images of 1344 x 1344.
    """
    buffer: Tensor | None = getattr(_thread, "workspace", None)
    if buffer is None or len(buffer) < numbers:
        buffer = _thread.workspace = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return buffer


def empty_maps(images: int, channels: int, height: int, width: int) -> Tensor:
    """(N, C, H, W), channels last. No view of anything: a residual block adds to it in place."""
    shape = (images, channels, height, width)
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def cells(maps_NCHW: Tensor) -> Tensor:
    """(N, H, W, C), dense: a view of channels-last maps, of others a copy."""
    return maps_NCHW.permute(0, 2, 3, 1).contiguous()
