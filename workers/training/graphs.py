"""CUDA graphs of the forward and backward pass: one launch by the host instead of thousands.

A graph replays the kernels of one step at the same addresses with the same arguments. So it is of
one canvas, reads copies of the batch and of the flags, and adds to gradients that keep their
memory. The optimiser stays outside: its rate changes with the steps, and it takes few launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contract.recipe import LoopConfig
from model.structures import Batch
from workers.tracking.spool import print_warning
from workers.training.step import Flags, Gradients
from workers.training.world import World

MOST_GRAPHS = 10  # each holds a copy of its batch; steps of other canvases stay eager
# What a first step builds (cuDNN's plans, compiled kernels, cached tensors) is not a graph's.
_EAGER_STEPS_OF_A_CANVAS = 2
# DDP times its first 10 steps with events, which a graph must not record, and later each n-th.
_TIMED_STEPS = 10
_NEVER_TIMED = 1 << 30

Accumulate = Callable[[Sequence[Batch], Flags], Gradients]
_Shapes = tuple[tuple[int, ...], ...]


@contextmanager
def own_stream(loop: LoopConfig, device: torch.device) -> Iterator[None]:
    """Within the block a training by graphs works on a stream of its own, its eager steps too.

    The default stream gives no graphs, and autograd and DDP stay where they began.
    """
    if not _wanted(loop, device):
        yield
        return
    outer = torch.cuda.current_stream(device)
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(outer)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        outer.wait_stream(own)


def by_graphs_or_eager(
    accumulate: Accumulate, module: nn.Module, loop: LoopConfig, world: World
) -> EagerGradients | GraphedGradients:
    """`accumulate` of `module`, by graphs where the run asks for them and can have them."""
    if not _wanted(loop, world.device):
        return EagerGradients(accumulate)
    why = _reason_for_eager(loop, module)
    if why:
        if world.is_first:
            print_warning(f"loop.cuda_graphs: every step stays eager: {why}")
        return EagerGradients(accumulate)
    if isinstance(module, DistributedDataParallel):
        module._set_ddp_runtime_logging_sample_rate(_NEVER_TIMED)  # type: ignore[no-untyped-call]
    return GraphedGradients(accumulate, world.device, world.size)


def _wanted(loop: LoopConfig, device: torch.device) -> bool:
    return loop.cuda_graphs and device.type == "cuda"


def _reason_for_eager(loop: LoopConfig, module: nn.Module) -> str:
    """Why no step of this training can be a graph; empty if some can."""
    if loop.precision == "fp16":
        return "with precision fp16 the host asks for each step's scale"
    if isinstance(module, DistributedDataParallel) and module.find_unused_parameters:
        return "this version of torch looks for unused parameters in each step"
    return ""


class EagerGradients:
    """`accumulate` as it is."""

    keeps_gradients = False

    def __init__(self, accumulate: Accumulate) -> None:
        self._accumulate = accumulate

    def __call__(self, batches: Sequence[Batch], flags: Sequence[float]) -> Gradients:
        return self._accumulate(batches, flags)

    def forget(self) -> None:
        """There is nothing to forget."""


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    batches: Sequence[Batch]
    gradients: Gradients

    def replay(self, batches: Sequence[Batch]) -> Gradients:
        for static, batch in zip(self.batches, batches, strict=True):
            for field in fields(batch):
                getattr(static, field.name).copy_(getattr(batch, field.name), non_blocking=True)
        self.graph.replay()
        # clones: the next replay writes to the same memory, and these are read some steps later
        return replace(
            self.gradients,
            losses_T=self.gradients.losses_T.clone(),
            flags=self.gradients.flags.clone(),
        )


class GraphedGradients:
    """`accumulate`, from the third step of a canvas on as a graph.

    The gradients have to keep their memory between the steps (`keeps_gradients`). All ranks capture
    in the same step, since they see the same canvases: NCCL exchanges buffers while it is captured.
    """

    keeps_gradients = True

    def __init__(self, accumulate: Accumulate, device: torch.device, ranks: int) -> None:
        self._accumulate, self._device, self._ranks = accumulate, device, ranks
        self._flags: list[Tensor] = []
        self._steps = 0
        self._refused = False
        self._told = False  # that there are more canvases than graphs
        self.forget()

    @property
    def num_graphs(self) -> int:
        """How many canvases have a graph by now."""
        return len(self._graphs)

    def forget(self) -> None:
        """Drops the graphs; they are captured again.

        After a rollback, since what modules derived from their weights may lie elsewhere. And
        before the process group ends, since NCCL waits for the graphs that use it.
        """
        self._graphs: dict[_Shapes, _Graph] = {}
        self._eager_steps: Counter[_Shapes] = Counter()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batches: Sequence[Batch], flags: Sequence[float]) -> Gradients:
        if not self._flags:
            zero = torch.zeros((), dtype=torch.float64, device=self._device)
            self._flags = [zero.clone() for _ in flags]
        for static, value in zip(self._flags, flags, strict=True):
            static.fill_(value)
        shapes = _shapes(batches)
        if shapes not in self._graphs and self._is_ready(shapes):
            self._capture(shapes, batches)
        if shapes in self._graphs:
            return self._graphs[shapes].replay(batches)
        if len(self._graphs) == MOST_GRAPHS and not self._told:
            self._told = True
            print_warning(
                f"loop.cuda_graphs: {MOST_GRAPHS} canvases have a graph, steps of others stay "
                f"eager; a new run with data.num_canvases of at most {MOST_GRAPHS} has no others"
            )
        self._eager_steps[shapes] += 1
        self._steps += 1
        return self._accumulate(batches, self._flags)

    def _is_ready(self, shapes: _Shapes) -> bool:
        return (
            not self._refused
            and len(self._graphs) < MOST_GRAPHS
            and self._eager_steps[shapes] >= _EAGER_STEPS_OF_A_CANVAS
            and self._steps > (_TIMED_STEPS if self._ranks > 1 else 0)
        )

    def _capture(self, shapes: _Shapes, batches: Sequence[Batch]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            static = [
                replace(batch, **{f.name: getattr(batch, f.name).clone() for f in fields(batch)})
                for batch in batches
            ]
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=torch.cuda.current_stream(),
                # threads of checkpoints, NCCL and pinned memory go on with calls of their own
                capture_error_mode="thread_local",
            ):
                gradients = self._accumulate(static, self._flags)
        except RuntimeError as error:
            if self._ranks > 1:  # DDP is in the middle of a step that the other ranks take
                if isinstance(error, torch.OutOfMemoryError):
                    raise  # its class says more
                raise RuntimeError(
                    f"no CUDA graph of this step ({error}); set loop.cuda_graphs=false"
                ) from error
            self._refused = True
            print_warning(f"loop.cuda_graphs: this step gives no graph, steps stay eager: {error}")
        else:
            self._graphs[shapes] = _Graph(graph, static, gradients)


def _shapes(batches: Sequence[Batch]) -> _Shapes:
    return tuple(
        tuple(getattr(batch, field.name).shape) for batch in batches for field in fields(batch)
    )
