"""Small valid values that tests of every room start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from contract.presets import run_preset
from contract.recipe import RunConfig, apply_overrides, parse_run


def tiny_run(
    overrides: Mapping[str, Any] | None = None, train: str = "train", val: str = "val"
) -> RunConfig:
    """The `tiny` preset on the given datasets."""
    data = apply_overrides(
        run_preset("tiny"), {"data.train": train, "data.val": val, **(overrides or {})}
    )
    return parse_run(data, "tests")


def one_box(x0: float = 4.0, y0: float = 4.0, x1: float = 20.0, y1: float = 28.0) -> Tensor:
    """One RoI of the first image: (1, 5) as (batch index, x0, y0, x1, y1)."""
    return torch.tensor([[0.0, x0, y0, x1, y1]])
