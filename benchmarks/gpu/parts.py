"""Which part of a detector gives the device its work, seen from the null CUDA of the tests.

A part is the innermost module at most two names deep ("backbone", "crops.box"), else the function
of ours that runs. In the backward pass it is the part that made the autograd node. Nothing here
knows a module by its name.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from tests.nullgpu.null_cuda import Event

_ROOT = Path(__file__).resolve().parents[2]
_OURS = (f"{_ROOT}/model/", f"{_ROOT}/workers/")
_DEPTH = 2


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of nested containers and records."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__"):
        return tensors_in(vars(value))
    return []


class Parts:
    """Counts the events of a step by part. Autograd has to run in the calling thread."""

    def __init__(self, detector: nn.Module) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self._modules: list[str] = []
        self._node = "the sum of the losses"
        self._seen: set[Node] = set()
        for name, module in detector.named_modules():
            if name.count(".") < _DEPTH:
                self._hook(name or "the losses", module)

    def _hook(self, name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, _inputs: object) -> None:
            if name != "the losses":  # there the function tells more
                self._modules.append(name)

        def leave(_module: nn.Module, _inputs: object, outputs: object) -> None:
            if name != "the losses":
                self._modules.pop()
            if torch.is_grad_enabled():
                self._label(tensors_in(outputs), name)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _label(self, outputs: list[Tensor], name: str) -> None:
        """The new autograd nodes behind `outputs` belong to `name`."""
        nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while nodes:
            node = nodes.pop()
            if node in self._seen:
                continue
            self._seen.add(node)
            leaf = type(node).__name__ == "AccumulateGrad"
            label = "gradients of the weights" if leaf else name
            node.register_prehook(lambda _gradients, label=label: self._enter(label))  # type: ignore[misc]
            nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]

    def _enter(self, label: str) -> None:
        self._node = label

    def now(self) -> str:
        """The part that runs."""
        # the engine numbers its runs from 0; outside of one it is -1
        if torch._C._current_graph_task_id() != -1:
            return f"backward of {self._node}"
        return self._modules[-1] if self._modules else _function()[0]

    def begin(self) -> None:
        self._seen.clear()
        self._node = "the sum of the losses"
        for counter in (self.operations, self.waits, self.pageable):
            counter.clear()

    def __call__(self, event: Event, what: str) -> None:
        if event is Event.OPERATION:
            self.operations[self.now()] += 1
        elif event is Event.WAIT:
            self.waits[f"{what}: {_function()[1]}"] += 1
        elif event is Event.PAGEABLE_COPY:
            self.pageable[f"{what}: {_function()[1]}"] += 1


def _function() -> tuple[str, str]:
    """The innermost function of ours that runs, and the line in it."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not frame.f_code.co_name.startswith("<"):
            path = file.removeprefix(f"{_ROOT}/")
            return f"{frame.f_code.co_name} ({path})", f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside", "outside"
