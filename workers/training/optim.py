"""The optimiser and the rate of each step, as pure functions of the records that describe them."""

from __future__ import annotations

import math
from typing import Any, assert_never

import torch
from torch import nn

from contract.recipe import SGD, AdamW, CosineSchedule, OneCycle, Optimiser, Schedule, StepSchedule

RATE_FACTOR = "rate_factor"  # of a group of parameters, on the rate of the step
_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.SyncBatchNorm)


def build_optimiser(cfg: Optimiser, module: nn.Module) -> torch.optim.Optimizer:
    """An optimiser over the trained parameters; normalisation layers have a decay of their own.

    A group of biases that has a rate of its own says by which factor, as `RATE_FACTOR`.
    """
    norm_ids = {
        id(p) for layer in module.modules() if isinstance(layer, _NORMS) for p in layer.parameters()
    }
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    norms = [p for _, p in trained if id(p) in norm_ids]
    others = [(name, p) for name, p in trained if id(p) not in norm_ids]
    biases = []
    if isinstance(cfg, SGD) and (cfg.bias_lr_factor, cfg.bias_decay_factor) != (1.0, 1.0):
        biases = [p for name, p in others if name.rpartition(".")[2] == "bias"]
    bias_ids = set(map(id, biases))
    groups: list[dict[str, Any]] = [
        {
            "params": [p for _, p in others if id(p) not in bias_ids],
            "weight_decay": cfg.weight_decay,
        },
        {"params": norms, "weight_decay": cfg.norm_weight_decay},
    ]
    if isinstance(cfg, SGD):
        decay = cfg.weight_decay * cfg.bias_decay_factor
        groups.append({"params": biases, "weight_decay": decay, RATE_FACTOR: cfg.bias_lr_factor})
    # where normalisation layers are frozen, the second group would be empty
    groups = [group for group in groups if group["params"]]
    match cfg:
        case SGD():
            return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=True)
        case AdamW():
            return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
        case _:
            assert_never(cfg)


def base_rate(cfg: Optimiser, global_batch: int) -> float:
    """The full rate, scaled linearly with the batch where the record asks for it."""
    return cfg.lr * (global_batch / cfg.lr_batch if cfg.lr_batch else 1.0)


def rate_factor(cfg: Schedule, step: int, steps: int) -> float:
    """The factor on the full rate in optimiser step `step` of `steps`, counted from 0."""
    match cfg:
        case StepSchedule():
            drops = sum(step >= drop for drop in cfg.drop_steps)
            return _warm_up(step, cfg.warmup_steps, cfg.warmup_factor) * float(cfg.factor**drops)
        case CosineSchedule():
            decayed = cfg.final_factor + (1 - cfg.final_factor) * _falling(step / steps)
            return _warm_up(step, cfg.warmup_steps, cfg.warmup_factor) * decayed
        case OneCycle():
            top = cfg.rise * steps
            if step < top:
                return 1 - (1 - cfg.start_factor) * _falling(step / top)
            return cfg.final_factor + (1 - cfg.final_factor) * _falling(
                (step - top) / max(steps - top, 1)
            )
        case _:
            assert_never(cfg)


def _warm_up(step: int, warmup_steps: int, start: float) -> float:
    return start + (1 - start) * step / warmup_steps if step < warmup_steps else 1.0


def _falling(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
