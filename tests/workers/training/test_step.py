"""The same optimiser step at any number of ranks and chunks: losses and gradients equal to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contract.recipe import RunConfig
from tests.builders import tiny_run
from tests.workers.fakes import FakeDetector, FakeLoader, alone, fake_trial, small_run
from tests.workers.ranks import run_ranks
from workers.training.build import initial_detector, open_datasets, train_loader_opener
from workers.training.state import TrainState
from workers.training.step import (
    LossSums,
    accumulate_gradients,
    apply_gradients,
    distributed,
)
from workers.training.world import World


def step_of(world: World, state: TrainState, batches: Any) -> dict[str, Any]:
    """Global losses and the gradients of one step, reduced over the ranks."""
    module = distributed(LossSums(state.detector), world)
    gradients = accumulate_gradients(
        module, batches, state.run.loop, world, state.scaler, (0.0, 1.0)
    )
    losses = world.sum(gradients.losses_T.clone()).tolist()
    return {
        "losses": dict(zip(gradients.names, losses, strict=True)),
        "flags": gradients.flags.tolist(),
        "gradients": {
            n: p.grad.clone() for n, p in state.detector.named_parameters() if p.grad is not None
        },
    }


def fake_step(world: World, run: RunConfig) -> dict[str, Any]:
    state = TrainState(run, FakeDetector())
    return step_of(world, state, next(iter(FakeLoader(run, world, 3))).batches)


def real_steps(world: World, run: RunConfig, until: int) -> list[dict[str, Any]]:
    """The real detector's first step, and the one after `until` steps.

    Every rank takes those in between alone, and they are the same on all.
    """
    data, _ = open_datasets(run, "")
    state = TrainState(run, initial_detector(run))
    alone_loader = iter(train_loader_opener(run, data, alone())(0))
    steps = [step_of(world, state, next(iter(train_loader_opener(run, data, world)(0))).batches)]
    state.optimiser.zero_grad()
    for _ in range(until):
        accumulate_gradients(
            LossSums(state.detector),
            next(alone_loader).batches,
            run.loop,
            alone(),
            state.scaler,
            (),
        )
        apply_gradients(state.trained, state.optimiser, state.scaler, 1e-3, 0.0)
    return [
        *steps,
        step_of(world, state, next(iter(train_loader_opener(run, data, world)(until))).batches),
    ]


def assert_same_step(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert actual["losses"] == pytest.approx(wanted["losses"], rel=1e-5, abs=1e-6)
    for name, gradient in wanted["gradients"].items():
        torch.testing.assert_close(
            actual["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_accumulating_chunks_gives_the_step_of_the_whole_batch(chunk):
    whole = fake_step(alone(), small_run(global_batch=7))
    assert_same_step(
        fake_step(alone(), small_run(global_batch=7, max_images_per_forward=chunk)), whole
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_batch_unevenly_give_the_step_of_one(ranks):
    """Seven images: 4 + 3 on two ranks, 3 + 2 + 2 on three, in chunks of two."""
    run = small_run(global_batch=7, max_images_per_forward=2)
    whole = fake_step(alone(), small_run(global_batch=7))
    for actual in run_ranks(fake_step, ranks, run):
        assert_same_step(actual, whole)
        assert actual["flags"] == [0.0, float(ranks)]


def test_the_detector_takes_the_same_step_on_one_two_and_three_ranks(packed):
    """Fresh and in the middle of training."""
    train, val = packed
    overrides = {"loop.global_batch": 4, "data.short_sides_px": [64], "data.max_side_px": 64}
    run = tiny_run(overrides, train, val)
    whole = real_steps(alone(), run, 2)
    for ranks in (2, 3):
        for steps in run_ranks(real_steps, ranks, run, 2):
            for step, wanted in zip(steps, whole, strict=True):
                assert_same_step(step, wanted)


def test_an_image_split_over_ranks_moves_no_metric(tmp_path):
    """The whole loop on the fake detector: the curves of two ranks are those of one."""
    run = small_run()
    one = fake_trial(tmp_path / "one", run)
    two = run_ranks(losses_of_trial, 2, tmp_path / "two", run)[0]
    assert two == pytest.approx([row.item() for row in flat_weights(one.state)], rel=1e-4, abs=1e-5)


def losses_of_trial(world: World, folder: Path, run: RunConfig) -> list[float]:
    return [value.item() for value in flat_weights(fake_trial(folder, run, world=world).state)]


def flat_weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten()[:20] for p in state.detector.parameters()])
