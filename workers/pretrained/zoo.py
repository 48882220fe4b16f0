"""Detectron2's model-zoo files: pickles of names to arrays.

A pickle may call any function when it is read. This reader lets it call what arrays need alone.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _latin1(text: str, _encoding: str) -> bytes:
    """What pickles of protocol 2 call for the bytes of an array."""
    return text.encode("latin1")


# The functions that an array's pickle names: `numpy.core` under numpy 1, `numpy._core` since.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only plain arrays are read"
            )
        return _ALLOWED[module, name]


def read_zoo_pickle(path: Path) -> dict[str, Tensor]:
    """The `model` of a `model_final_*.pkl` in detectron2's names.

    Raises ValueError if the file is anything else.
    """
    try:
        with path.open("rb") as file:
            data = _Arrays(file, encoding="latin1").load()
    # what a damaged or foreign pickle raises, by where it breaks
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        raise ValueError(f"{path} is no model-zoo file of plain arrays ({error})") from error
    state = data.get("model") if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(value, np.ndarray) for value in state.values()
    ):
        raise ValueError(
            f"{path} is no model-zoo file: a dict with names to arrays under 'model' is expected"
        )
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
