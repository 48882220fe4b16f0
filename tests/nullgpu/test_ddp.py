"""DDP's reducer over a NCCL that sends nothing: one process says that it is one of two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import distributed as torch_distributed

from contract.presets import preset
from contract.recipe import SGD, LoopConfig
from model.accelerate import accelerate
from model.build import build_detector
from tests.model.batches import shape_batch
from tests.nullgpu import null_cuda
from workers.training.optim import build_optimiser
from workers.training.step import LossSums, accumulate_gradients, apply_gradients, distributed
from workers.training.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not null_cuda.loaded(), reason="not on the null CUDA"),
]


@pytest.fixture
def two_ranks(monkeypatch):
    # it would gather the shapes of the other rank, which is not there
    monkeypatch.setattr(
        torch_distributed, "_verify_param_shape_across_processes", lambda *_, **__: None
    )
    # the order of the buckets is copied to the device and back
    null_cuda.keep_values(True)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 2, torch.device("cuda", 0))
    dist.destroy_process_group()
    null_cuda.keep_values(False)


def test_a_step_of_two_ranks_never_waits(two_ranks):
    detector = build_detector(preset("tiny")).to("cuda").train()
    accelerate(detector)
    module = distributed(LossSums(detector), two_ranks)
    optimiser, loop = build_optimiser(SGD(), detector), LoopConfig(precision="bf16")
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    trained = [p for p in detector.parameters() if p.requires_grad]
    batch = shape_batch().to("cuda")
    # in its first ten steps DDP waits to time itself
    for _ in range(14):
        null_cuda.reset()
        accumulate_gradients(module, [batch], loop, two_ranks, scaler, (0.0, 0.0))
        apply_gradients(trained, optimiser, scaler, 0.01, 0.0)
    found = null_cuda.figures()
    assert null_cuda.waits(found) == 0
    assert found["pageable_copies"] == found["copies_to_host"] == 0
    assert found["collectives"] >= 2  # the counts, then the buckets
