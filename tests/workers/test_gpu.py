"""What only a GPU shows: a step that never waits for the host, and how far equal runs agree."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.workers.trials import run_of, spec_of
from workers.training.build import initial_detector, open_datasets, train_loader_opener
from workers.training.meter import Meter
from workers.training.run import run_trial
from workers.training.state import TrainState
from workers.training.step import LossSums, accumulate_gradients, apply_gradients
from workers.training.world import World
from workers.trial.flags import FlagReader
from workers.trial.stop import StopRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_never_wait_for_the_host(packed, precision):
    """Everything that the loop does in a step on which no value is due."""
    world = World(0, 1, torch.device("cuda", 0))
    run = run_of(packed, loop__precision=precision, loop__ema_decay=0.9)
    state = TrainState(run, initial_detector(run, world.device))
    sums, meter, flags = LossSums(state.detector), Meter(), FlagReader(world.device)
    batches = iter(train_loader_opener(run, open_datasets(run, "")[0], world)(0))
    try:
        for step in range(12):
            chunks = [batch.to(world.device, non_blocking=True) for batch in next(batches).batches]
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
            gradients = accumulate_gradients(
                sums, chunks, run.loop, world, state.scaler, (0.0, 0.0)
            )
            norm = apply_gradients(state.trained, state.optimiser, state.scaler, 1e-4, 10.0)
            state.update_average()
            meter.add(step, gradients, norm, {})
            assert flags.read(gradients.flags) == ""
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(parameter.detach().cpu()).all() for parameter in state.trained)


def test_two_runs_of_one_seed_take_the_same_first_step(tmp_path, packed):
    """Later steps only resemble each other: on a GPU the order of atomic additions differs."""
    first, second = (losses_of(tmp_path / name, packed) for name in ("first", "second"))
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    assert len(first) == len(second) == 4


def losses_of(folder: Path, packed: tuple[str, str]) -> list[float]:
    world = World(0, 1, torch.device("cuda", 0))
    outcome = run_trial(
        spec_of(folder, run_of(packed)), world, StopRequest(), lambda progress: None
    )
    assert outcome.state == "done", outcome.error
    losses: list[float] = pq.read_table(folder / "artifacts/series.parquet")["loss"].to_pylist()
    return losses
