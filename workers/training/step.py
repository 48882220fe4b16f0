"""One optimiser step on this rank's share of a global batch: the same sums at any number of ranks.

Every loss is `weight * sum / count` with the count of the whole global batch, so ranks and chunks
may be of any size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contract.recipe import LoopConfig
from model.structures import Batch
from workers.training.arithmetic import DTYPES
from workers.training.optim import RATE_FACTOR
from workers.training.world import World

# Numbers, or float64 scalars that lie on the device already.
Flags: TypeAlias = Sequence[float] | Sequence[Tensor]


class LossSums(nn.Module):
    """A detector's weighted loss sums and their counts as plain dicts.

    DDP and `torch.compile` see through dicts, not through the detector's own records.
    `in_arrival_order` lists the parameters last to first, the order in which the backward pass
    produces their gradients.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.in_arrival_order = nn.ParameterList(reversed(list(detector.parameters())))
        self.detector = detector

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        terms = self.detector(batch)
        weighted = {name: term.sum * term.weight for name, term in terms.items()}
        return weighted, {name: term.count for name, term in terms.items()}


# the private calls of `distributed`, which another version of torch may not have
CAN_PIN = all(
    hasattr(dist.Reducer, name)  # type: ignore[attr-defined]
    for name in ("_push_all_rebuilt_params", "_rebuild_buckets")
)


def distributed(sums: LossSums, world: World, can_pin: bool = CAN_PIN) -> nn.Module:
    """`sums` under DDP with buckets that are the same in every process, from the first step on.

    DDP would rebuild its buckets after the first backward pass, in the order in which gradients
    arrived. With three or more ranks the order of a sum, and so its last bits, would then differ
    between a resumed run and one that never stopped. Declaring the parameters in arrival order and
    rebuilding at once pins the buckets. That takes two private calls. A torch without them gets
    `find_unused_parameters`, under which DDP keeps its first buckets, at a small cost.
    """
    if world.size == 1:
        return sums
    with warnings.catch_warnings():
        # the older versions of torch know no other name for it
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        module = DistributedDataParallel(
            sums,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=not can_pin,
        )
    # a warning about 1 x 1 convolutions in channels-last order: their strides are ambiguous, which
    # costs nothing
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    if can_pin:
        module.reducer._push_all_rebuilt_params()
        module.reducer._rebuild_buckets()
    return module


@dataclass(frozen=True)
class Gradients:
    """What a step leaves beside the gradients, on the device.

    names: of the T loss terms. losses_T: this rank's share of each global loss. flags: summed over
    the ranks.
    """

    names: tuple[str, ...]
    losses_T: Tensor
    flags: Tensor


def accumulate_gradients(
    module: nn.Module,
    batches: Sequence[Batch],
    loop: LoopConfig,
    world: World,
    scaler: torch.amp.GradScaler,
    flags: Flags,
) -> Gradients:
    """Adds the gradients of the global batch's loss to the parameters.

    One reduction carries the counts of the losses and the `flags`.
    """
    sums = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(sums, LossSums)
    autocast = _autocast(loop, world)
    single = len(batches) == 1
    with autocast():
        if single:
            weighted, counts = module(batches[0])
        else:
            counts = _counts_of(sums.detector, batches)
    names = tuple(sorted(counts))
    # filled on the device: a tensor of the host would be copied, and the host would wait
    filled = [
        flag
        if isinstance(flag, Tensor)
        else torch.full((), flag, dtype=torch.float64, device=world.device)
        for flag in flags
    ]
    sums_TF = world.sum(torch.stack([*(counts[n].double() for n in names), *filled]))
    # a term that counts nothing in the whole batch has a sum of 0: 0 / 1, not 0 / 0
    total_T = sums_TF[: len(names)].clamp(min=1).float()

    losses_T = torch.zeros_like(total_T)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with _without_sync(module, last):
            if not single:
                with autocast():
                    weighted, _ = module(batch)
            terms_T = torch.stack([weighted[n].float() for n in names]) / total_T
            # DDP takes the mean over ranks; the sum is wanted
            scaler.scale(terms_T.sum() * world.size).backward()  # type: ignore[no-untyped-call]
            losses_T += terms_T.detach()
    return Gradients(names, losses_T, sums_TF[len(names) :])


def _counts_of(detector: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The counts of all chunks. They come before the losses: each chunk is divided by the total."""
    per_chunk = [detector.counts(batch) for batch in batches]
    return {
        name: torch.stack([counts[name] for counts in per_chunk]).sum() for name in per_chunk[0]
    }


def _without_sync(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Ranks reduce their gradients once, in the backward pass of the last chunk."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[None] = module.no_sync()
    return context


def _autocast(loop: LoopConfig, world: World) -> Callable[[], AbstractContextManager[None]]:
    dtype = DTYPES[loop.precision]
    return lambda: torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


def apply_gradients(
    parameters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
    clip_norm: float,
    keep_memory: bool = False,
) -> Tensor:
    """One optimiser step at `rate`. Returns the norm of the gradients before clipping.

    clip_norm: what longer gradients are scaled down to, 0 for no limit. keep_memory: whether the
    next step's gradients lie where these do.
    """
    scaler.unscale_(optimiser)  # first, so that norm and limit are of the true gradients
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=not keep_memory)
    return norm
