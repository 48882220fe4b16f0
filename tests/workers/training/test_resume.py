"""A run that is killed at any moment and resumed ends with the bits of one that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from contract.files import Files
from contract.recipe import CosineSchedule, RunConfig, StepSchedule
from tests.workers.fakes import DyingStorage, Trial, die, fake_trial, small_run
from tests.workers.ranks import run_ranks
from workers.training.evaluate import Scores
from workers.training.state import TrainState
from workers.training.step import distributed
from workers.training.world import World
from workers.trial.stop import StopRequest


def kill_in_step(world: World, folder: Path, run: RunConfig, step: int, rank: int) -> str:
    def visit(now: int) -> None:
        if now == step and world.rank == rank:
            die()

    return fake_trial(folder, run, world=world, visit=visit).digest


def kill_in_write(world: World, folder: Path, run: RunConfig, write: int) -> str:
    storage = DyingStorage(str(folder), write) if world.is_first else Files(str(folder))
    return fake_trial(folder, run, world=world, storage=storage).digest


def go_on(world: World, folder: Path, run: RunConfig, attempt: int) -> tuple[str, int]:
    trial = fake_trial(folder, run, world=world, attempt=attempt)
    return trial.digest, trial.state.step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and step of `small_run()` on one rank that nobody stopped."""
    [result] = run_ranks(go_on, 1, tmp_path_factory.mktemp("whole"), small_run(), 1)
    return result


@pytest.mark.parametrize("step", [2, 7])
def test_killed_in_a_step_resumes_to_the_same_bits(tmp_path, whole, step):
    run_ranks(kill_in_step, 1, tmp_path, small_run(), step, 0)
    assert run_ranks(go_on, 1, tmp_path, small_run(), 2) == [whole]


@pytest.mark.parametrize("write", [1, 2, 3, 5])
def test_killed_in_a_checkpoint_write_resumes_to_the_same_bits(tmp_path, whole, write):
    """Writes 1, 2 and 3 are tensors, plain data and marker of the first checkpoint."""
    assert run_ranks(kill_in_write, 1, tmp_path, small_run(), write) == [None]
    assert run_ranks(go_on, 1, tmp_path, small_run(), 2) == [whole]


def test_three_ranks_killed_twice_resume_to_the_same_bits(tmp_path):
    """Six images on three ranks. Without pinned buckets a restarted process rounds otherwise."""
    run = small_run()
    whole = run_ranks(go_on, 3, tmp_path / "whole", run, 1)
    run_ranks(kill_in_step, 3, tmp_path / "killed", run, 5, 1)
    run_ranks(kill_in_write, 3, tmp_path / "killed", run.model_copy(), 4)
    resumed = run_ranks(go_on, 3, tmp_path / "killed", run, 3)
    assert resumed == whole
    assert len({digest for digest, _ in resumed}) == 1


@pytest.mark.slow
def test_without_torchs_private_calls_three_ranks_resume_to_the_same_bits_too(tmp_path):
    run = small_run()
    whole = run_ranks(unpinned, 3, go_on, tmp_path / "whole", run, 1)
    run_ranks(unpinned, 3, kill_in_step, tmp_path / "killed", run, 5, 1)
    assert run_ranks(unpinned, 3, go_on, tmp_path / "killed", run, 2) == whole


def unpinned(world: World, function: Any, *arguments: Any) -> Any:
    import workers.training.loop

    workers.training.loop.distributed = partial(distributed, can_pin=False)
    return function(world, *arguments)


def test_a_stop_request_checkpoints_and_the_next_start_resumes_to_the_same_bits(tmp_path, whole):
    run = small_run()
    stop = StopRequest()
    stopped = fake_trial(
        tmp_path / "stopped",
        run,
        stop=stop,
        visit=lambda now: stop.ask("stopped") if now == 5 else None,
    )
    assert (stopped.ending.state, stopped.state.step) == ("stopped", 6)
    assert run_ranks(go_on, 1, tmp_path / "stopped", run, 2) == [whole]


def test_a_stop_asked_of_one_rank_ends_all_at_the_same_step(tmp_path):
    endings = run_ranks(stop_on_last_rank, 3, tmp_path, small_run())
    assert endings == [("preempted", 4)] * 3


def stop_on_last_rank(world: World, folder: Path, run: RunConfig) -> tuple[str, int]:
    stop = StopRequest()
    trial = fake_trial(
        folder,
        run,
        world=world,
        stop=stop,
        visit=lambda now: stop.ask("preempted") if (now, world.rank) == (3, 2) else None,
    )
    return trial.ending.state, trial.state.step


def test_a_stop_during_the_evaluation_repeats_it_after_the_resume(tmp_path):
    run = small_run()
    first = fake_trial(tmp_path, run, evaluate=lambda state, stopping: None)
    assert first.ending.state == "preempted"
    again: Trial = fake_trial(tmp_path, run, attempt=2)
    assert (again.ending.state, again.state.step) == ("done", 12)
    assert again.ending.scores is not None


def test_a_finished_run_takes_more_steps_where_no_rate_depends_on_their_number(tmp_path):
    schedule = StepSchedule(drop_steps=(6,), warmup_steps=2)
    short, long = (
        small_run(steps=steps).model_copy(update={"schedule": schedule}) for steps in (10, 14)
    )
    assert fake_trial(tmp_path / "t", short).ending.state == "done"
    evaluated: list[int] = []

    def evaluate(state: TrainState, stopping: Callable[[], bool]) -> Scores:
        evaluated.append(state.step)
        return Scores({"bbox/AP": 0.5}, {}, {})

    more = fake_trial(tmp_path / "t", long, attempt=2, evaluate=evaluate)
    assert evaluated == [10, 14], "the last checkpoint lacks what the evaluation after it found"
    assert (more.state.step, more.digest) == (14, fake_trial(tmp_path / "whole", long).digest)
    with pytest.raises(ValueError, match=r"written with loop\.steps = 14, this run has 10; set it"):
        fake_trial(tmp_path / "t", short, attempt=3)
    cosine = {"schedule": CosineSchedule(warmup_steps=2)}
    fake_trial(tmp_path / "c", short.model_copy(update=cosine))
    with pytest.raises(
        ValueError, match=r"has 14 \(schedule\.kind cosine spreads over all steps\)"
    ):
        fake_trial(tmp_path / "c", long.model_copy(update=cosine), attempt=2)


def test_a_run_resumes_on_another_number_of_ranks_with_the_same_global_batches(tmp_path):
    run = small_run()
    run_ranks(kill_in_step, 2, tmp_path, run, 9, 0)
    [(_, step)] = run_ranks(go_on, 1, tmp_path, run, 2)
    assert step == 12


def test_average_and_scaler_are_part_of_the_state(tmp_path):
    run = small_run(ema_decay=0.9)
    run_ranks(kill_in_step, 1, tmp_path / "killed", run, 6, 0)
    resumed = fake_trial(tmp_path / "killed", run, attempt=2)
    whole = fake_trial(tmp_path / "whole", run)
    assert [a.tolist() for a in resumed.state.average] == [a.tolist() for a in whole.state.average]
    assert resumed.digest == whole.digest
