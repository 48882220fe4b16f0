"""Random integers as a pure function of (sample, stream, index).

Neither rank nor position in the batch changes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Ground-truth objects are RoI candidates too: their indices start here, those of anchors are below.
OBJECT_INDEX = 1 << 40
# Streams of one sample that must not repeat each other.
RPN_STREAM, ROI_STREAM, DROPOUT_STREAM = 1, 2, 3

# The constants of splitmix64 (Steele, Lea and Flood, 2014), as the int64 numbers that wrap to them.
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
STREAM_STEP = 0x632BE59BD9B4E019
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def noise(keys: Tensor, stream: int, index: Tensor) -> Tensor:
    """int64 in [0, 2**62) from int64 keys and indices that broadcast together (splitmix64, two
    rounds).
    """
    seed = _mix(keys + _as_int64(stream * STREAM_STEP))
    # The exclusive or with 0 changes no number. It hides an `arange` from Inductor, which would
    # multiply it as an int32 expression, and the constant is out of that range on CUDA.
    return _mix(seed + (index ^ 0) * GOLDEN) & ((1 << 62) - 1)


def _as_int64(number: int) -> int:
    """The number that int64 arithmetic, which wraps around, would have."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    # torch shifts the sign in from the left; the mask takes it away.
    return torch.bitwise_right_shift(x, bits) & ((1 << (64 - bits)) - 1)
