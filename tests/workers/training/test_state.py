"""The state of a training: what changes it outside the loss leaves nothing for autograd behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tests.workers.fakes import fake_trial, small_run
from workers.training.state import TrainState


class ManyParameters(nn.Module):
    """A hundred small ones: what a step leaves per parameter shows in the process's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(16)) for _ in range(100))


def test_four_hundred_steps_of_the_average_take_no_memory():
    state = TrainState(small_run(ema_decay=0.9), ManyParameters())
    for _ in range(20):
        state.update_average()
    before = psutil.Process().memory_info().rss
    for _ in range(400):
        state.update_average()
    # with gradients on, an update of one parameter left 540 bytes: 22 MB here
    assert psutil.Process().memory_info().rss - before < 4e6
    torch.testing.assert_close(list(state.trained), state.average)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def test_no_part_of_the_state_is_in_a_graph_after_training_evaluating_and_resuming(tmp_path):
    run = small_run(ema_decay=0.9, eval_every_steps=4)
    trial = fake_trial(tmp_path, run)
    resumed = fake_trial(tmp_path, run, attempt=2)  # restores the last checkpoint
    for state in (trial.state, resumed.state):
        with state.evaluated_weights():
            pass
        kept = [
            *state.average,
            *state.detector.buffers(),
            *tensors_in(state.optimiser.state_dict()),
            *tensors_in(state.scaler.state_dict()),
        ]
        assert len(state.average) == len(state.trained) > 0
        assert not any(tensor.requires_grad for tensor in kept)
        assert all(p.grad_fn is None and p.requires_grad for p in state.trained)
