"""The files of weights that a run writes, by their short names."""

from __future__ import annotations

from typing import Literal, TypeAlias

from contract.attempt import BEST_WEIGHTS, LAST_WEIGHTS
from contract.files import Files

Which: TypeAlias = Literal["last", "best"]
WEIGHTS: dict[Which, str] = {"last": LAST_WEIGHTS, "best": BEST_WEIGHTS}


def check_written(storage: Files, weights: str) -> None:
    """Raises ValueError if the run in this folder has no such file of weights."""
    if not storage.exists(weights):
        raise ValueError(
            f"{storage.uri}: has no {weights}; a run writes the last weights when it is finished "
            "(resume it), and the best ones at an evaluation with a score"
        )
