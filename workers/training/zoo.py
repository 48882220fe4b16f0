"""Detectron2's model-zoo files: pickles of names to arrays, read without running anything that a pickle may call."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _latin1(text: str, _encoding: str) -> bytes:
    """What stands for the bytes of an array in pickles of protocol 2."""
    return text.encode("latin1")


# What an array's pickle names. Files written under numpy 1 say `numpy.core`, newer ones `numpy._core`.
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
    """The `model` of a `model_final_*.pkl` in detectron2's names. Raises ValueError if it is anything else."""
    try:
        with path.open("rb") as file:
            data = _Arrays(file, encoding="latin1").load()
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
