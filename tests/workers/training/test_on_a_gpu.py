"""The whole training loop on a device: what it waits for, what it copies, and its CUDA graphs.

Counts come from the null CUDA, on which `tests/nullgpu` runs this file; a GPU gives values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.recipe import LoopConfig, RunConfig
from model.structures import Batch
from pipelines.load.loader import TrainLoader, TrainStep
from tests.nullgpu import null_cuda
from tests.workers.fakes import fake_trial, make_batch
from tests.workers.trials import run_of
from workers.training.build import initial_detector, open_datasets, train_loader_opener
from workers.training.graphs import GraphedGradients, own_stream
from workers.training.step import Gradients
from workers.training.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WORLD = World(0, 1, torch.device("cuda", 0))
STEPS = 9
SETTINGS = {
    "loop__steps": STEPS,
    "loop__log_every_steps": 100,
    "loop__precision": "bf16",
    "loop__ema_decay": 0.9,
    "data__num_canvases": 1,
}


class Counted:
    """A loader that notes the device's figures whenever the next step is fetched."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.figures: list[dict[str, int]] = []

    def __iter__(self) -> Iterator[TrainStep]:
        for step in self._loader:
            if null_cuda.loaded():
                self.figures.append(null_cuda.figures())
                null_cuda.reset()
            yield step

    def sample_ids(self, step: int) -> list[int]:
        return self._loader.sample_ids(step)

    def close(self) -> None:
        self._loader.close()


def counted(folder: Path, run: RunConfig) -> list[dict[str, int]]:
    """The figures of each step of a training, from one fetch to the next."""
    opened: list[Counted] = []
    opener = train_loader_opener(run, open_datasets(run, "")[0], WORLD)

    def open_loader(start: int) -> Counted:
        opened.append(Counted(opener(start)))
        return opened[-1]

    detector = initial_detector(run, WORLD.device)
    trial = fake_trial(folder, run, world=WORLD, detector=detector, open_loader=open_loader)
    assert trial.ending.state == "done"
    assert trial.state.step == STEPS
    return opened[0].figures


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_waits_for_nothing_and_stages_no_copy(tmp_path, packed, workers):
    """From blocks of a worker, and from private memory, which goes through pinned memory."""
    run = run_of(packed, **SETTINGS, data__num_loader_workers=workers)
    for found in counted(tmp_path, run)[3:]:
        assert found["pageable_copies"] == found["pageable_to_host"] == 0
        assert found["stream_waits"] == found["device_waits"] == found["blocking_copies"] == 0
        assert found["event_waits"] <= 1, "the flags of two steps before"
        assert found["pinned_copies"] >= 1


def test_a_step_is_one_launch_with_cuda_graphs(tmp_path, packed, capsys):
    run = run_of(packed, **SETTINGS, loop__cuda_graphs=True)
    figures = counted(tmp_path, run)
    assert "stay eager" not in capsys.readouterr().out
    if not figures:  # a GPU
        return
    # the step before the first fetch of this list is none, and a batch is fetched one step ahead
    captures = [index for index, found in enumerate(figures) if found["captured"]]
    assert captures == [4], "after two eager steps"
    for found in figures[5:]:
        assert found["graph_launches"] == 1
        assert found["graph_nodes"] > 500
        assert null_cuda.operations(found) < 60
        assert found["pageable_copies"] == found["stream_waits"] == found["device_waits"] == 0


def numbered(number: int, side: int = 8) -> list[Batch]:
    pixels = torch.full((2, 3, side, side), number, dtype=torch.uint8)
    return [make_batch(pixels, torch.full((2,), number)).to(WORLD.device)]


def graphed(calls: list[int], ranks: int = 1, read: bool = False) -> GraphedGradients:
    """Sums of the images as losses; `calls` gets one entry for each eager step or capture."""

    def accumulate(batches: Sequence[Batch], flags: Sequence[Tensor]) -> Gradients:
        calls.append(len(calls))
        sums = torch.stack([batch.images.float().sum() for batch in batches])
        if read:
            sums.tolist()
        return Gradients(("sum",), sums, torch.stack(list(flags)))

    return GraphedGradients(accumulate, WORLD.device, ranks)  # type: ignore[arg-type]


@pytest.fixture
def _stream() -> Iterator[None]:
    with own_stream(LoopConfig(cuda_graphs=True), WORLD.device):
        yield
    torch.cuda.synchronize()


@pytest.mark.usefixtures("_stream")
def test_each_canvas_has_its_graph_and_outputs_survive_the_next_step():
    calls: list[int] = []
    gradients = graphed(calls)
    found = [gradients(numbered(number), (number % 2, 0.0)) for number in range(6)]
    assert len(calls) == 3, "two eager steps and a capture"
    for number in range(3):
        gradients(numbered(number, side=16), (0.0, 0.0))
    assert len(calls) == 6
    if not null_cuda.loaded():  # there values mean nothing
        assert [int(each.losses_T) for each in found] == [2 * 3 * 64 * n for n in range(6)]
        assert [each.flags.tolist() for each in found] == [[n % 2, 0.0] for n in range(6)]
    gradients.forget()
    gradients(numbered(1), (0.0, 0.0))
    assert len(calls) == 7, "after a rollback the step is eager"


@pytest.mark.usefixtures("_stream")
def test_several_ranks_capture_after_the_steps_that_ddp_times():
    calls: list[int] = []
    gradients = graphed(calls, ranks=2)
    for number in range(14):
        gradients(numbered(number), (0.0, 0.0))
    assert len(calls) == 12, "eleven eager steps and a capture"


@pytest.mark.usefixtures("_stream")
def test_a_step_that_reads_a_value_stays_eager_and_says_so(capsys):
    calls: list[int] = []
    gradients = graphed(calls, read=True)
    for number in range(5):
        gradients(numbered(number), (0.0, 0.0))
    assert len(calls) == 6, "five eager steps and an attempt"
    assert capsys.readouterr().out.count("stay eager") == 1


@pytest.mark.usefixtures("_stream")
def test_a_rank_of_several_that_cannot_capture_ends_with_a_remedy():
    gradients = graphed([], ranks=2, read=True)
    for number in range(11):
        gradients(numbered(number), (0.0, 0.0))
    with pytest.raises(RuntimeError, match=r"loop\.cuda_graphs=false"):
        gradients(numbered(0), (0.0, 0.0))
