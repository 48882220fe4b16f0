"""What a CUDA graph of a step rests on: every step of a canvas is the same operations.

Only the values in memory differ. The tests compare the operations of eager steps on the CPU with
the padding kept, as on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from contract.recipe import RunConfig
from model.build import build_detector
from model.detector import Detector
from model.rpn.nms import Suppression, nms_fixed_shape
from model.structures import Batch
from tests.builders import tiny_run
from tests.model.batches import shape_batch
from tests.workers.fakes import alone, weights_digest
from workers.training.state import TrainState
from workers.training.step import LossSums, accumulate_gradients, apply_gradients

SIDE = 64  # pixels of a canvas
FEW_PROPOSALS = {"model.rpn.pre_nms_train": 62, "model.rpn.post_nms_train": 50}


class Operations(TorchDispatchMode):
    """Each operation with its arguments: numbers as they are, tensors by place or by layout."""

    def __init__(self, places: dict[int, str]) -> None:
        super().__init__()
        self._places = places
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), self._described(args), self._described(kwargs or {})))
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            layout = (tuple(value.shape), value.stride(), value.dtype)
            # an empty tensor has the address 0
            return layout, self._places.get(value.data_ptr(), "") if value.numel() else ""
        if isinstance(value, dict):
            return {name: self._described(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._described(part) for part in value]
        return value


class FixedSuppression(nn.Module):
    """The path that a GPU without our kernels takes."""

    def __init__(self, max_iou: float) -> None:
        super().__init__()
        self.max_iou = max_iou

    def forward(self, boxes_LN4: Tensor, valid_LN: Tensor) -> Tensor:
        return nms_fixed_shape(boxes_LN4, valid_LN, self.max_iou)


def as_on_a_gpu(detector: Detector) -> Detector:
    """With fixed shapes on the CPU."""
    detector.keep_padding = True
    for parent in list(detector.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Suppression):
                setattr(parent, name, FixedSuppression(child.max_iou))
    return detector.train()


class Training:
    """Steps as a training by graphs takes them: flags and gradients keep their places."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.state = TrainState(run, as_on_a_gpu(build_detector(run.model, run.seed)))
        self._flags = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        self._static = [shape_batch(images=1, objects=3, side=SIDE, seed=99)]

    def start_again(self) -> None:
        fresh = build_detector(self.run.model, self.run.seed)
        self.state.detector.load_state_dict(fresh.state_dict())
        self.state.begin()

    def step(self, batch: Batch, keep_memory: bool = True) -> None:
        self._gradients(batch)
        state = self.state
        rate = 1e-3 / (1 + state.step)
        apply_gradients(state.trained, state.optimiser, state.scaler, rate, 1.0, keep_memory)
        state.update_average()
        state.step += 1

    def recorded(self, batch: Batch) -> list[Any]:
        """The operations of a step's gradients; the step is then finished."""
        with Operations(self._places()) as operations:
            self._gradients(batch)
        self.state.optimiser.zero_grad(set_to_none=False)
        return operations.seen

    def _gradients(self, batch: Batch) -> None:
        for name, tensor in vars(batch).items():
            getattr(self._static[0], name).copy_(tensor)
        accumulate_gradients(
            LossSums(self.state.detector),
            self._static,
            self.run.loop,
            alone(),
            self.state.scaler,
            self._flags,
        )

    def _places(self) -> dict[int, str]:
        detector = self.state.detector
        places = {tensor.data_ptr(): name for name, tensor in detector.state_dict().items()}
        for name, parameter in detector.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                places[parameter.grad.data_ptr()] = f"gradient of {name}"
        return places


def weights_and_gradients(state: TrainState) -> list[int]:
    tensors = [*state.detector.state_dict().values(), *(p.grad for p in state.trained)]
    return [tensor.data_ptr() for tensor in tensors]


def batch(seed: int, objects: int = 3) -> Batch:
    """One small image with three slots for objects."""
    whole = shape_batch(images=1, objects=3, side=SIDE, seed=seed)
    return replace(whole, valid=(torch.arange(3) < objects)[None])


@pytest.fixture
def training() -> Training:
    return Training(tiny_run(FEW_PROPOSALS | {"loop.ema_decay": 0.9}))


def test_two_steps_of_a_canvas_are_the_same_operations(training):
    training.step(batch(0))
    first = training.recorded(batch(1))
    assert len(first) > 500
    training.step(batch(2))
    for other in (batch(3), batch(4, objects=0), batch(5, objects=1)):
        assert training.recorded(other) == first


def test_rollback_evaluation_and_a_new_start_keep_places_and_operations(training):
    """Weights and gradients stay where a graph has them."""
    state = training.state
    training.step(batch(0))
    snapshot, places = state.snapshot(), weights_and_gradients(state)
    first = training.recorded(batch(1))
    training.step(batch(2))
    state.restore(snapshot)
    assert training.recorded(batch(3)) == first
    with state.evaluated_weights():
        state.detector.eval()
        state.detector.predict(batch(4))  # type: ignore[operator]
    state.detector.train()
    assert training.recorded(batch(5)) == first
    training.start_again()
    assert training.recorded(batch(0)) == first
    assert weights_and_gradients(state) == places


def test_a_resumed_training_takes_the_same_operations(training):
    training.step(batch(0))
    snapshot = training.state.snapshot()
    first = training.recorded(batch(1))
    resumed = Training(training.run)
    resumed.state.restore(snapshot)
    resumed.step(batch(2))
    assert resumed.recorded(batch(1)) == first


def test_gradients_that_keep_their_memory_give_the_same_bits():
    """A sum that begins with zeros is the gradient that is written anew."""
    digests = []
    for keep in (False, True):
        training = Training(tiny_run(FEW_PROPOSALS))
        for seed in range(3):
            training.step(batch(seed), keep_memory=keep)
        digests.append(weights_digest(training.state.detector))
    assert digests[0] == digests[1]
