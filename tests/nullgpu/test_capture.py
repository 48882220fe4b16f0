"""CUDA graphs, on a GPU and on the null CUDA: what can be captured, and what CUDA refuses.

On a GPU this shows that the null CUDA refuses neither more nor less.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.nullgpu import null_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class World:
    """Tensors and streams made before the capture."""

    def __init__(self) -> None:
        self.there = torch.ones(4, device="cuda")
        self.pageable = torch.zeros(4)
        self.pinned = torch.zeros(4).pin_memory()
        self.side = torch.cuda.Stream()
        self.before = torch.cuda.Event()
        self.before.record(self.side)
        self.kept: list[torch.Tensor] = []

    def fork(self) -> None:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.there.add_(1)

    def fork_and_join(self) -> None:
        self.fork()
        torch.cuda.current_stream().wait_stream(self.side)
        self.there.add_(1)


REFUSED: dict[str, Callable[[World], object]] = {
    "a value for the host": lambda w: w.there.sum().item(),
    "a shape that depends on values": lambda w: w.there.nonzero(),
    "a wait for the device": lambda w: torch.cuda.synchronize(),
    "a wait for the stream": lambda w: torch.cuda.current_stream().synchronize(),
    "a question to the stream": lambda w: torch.cuda.current_stream().query(),
    "a question to an event": lambda w: w.before.query(),
    "a copy of pageable memory": lambda w: w.there.copy_(w.pageable, non_blocking=True),
    "waiting for work outside": lambda w: torch.cuda.current_stream().wait_event(w.before),
    "a stream that does not come back": lambda w: w.fork(),
}

CAPTURED: dict[str, Callable[[World], object]] = {
    "a copy of pinned memory": lambda w: w.there.copy_(w.pinned, non_blocking=True),
    "a copy to pinned memory": lambda w: w.pinned.copy_(w.there, non_blocking=True),
    "memory of the graph's pool": lambda w: w.kept.append(torch.zeros(1 << 24, device="cuda")),
    "a stream that comes back": lambda w: w.fork_and_join(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_refuses(name):
    with pytest.raises(RuntimeError):
        captured(REFUSED[name])
    torch.cuda.synchronize()  # the device works on
    captured(CAPTURED["a copy of pinned memory"]).replay()


@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_captures(name):
    captured(CAPTURED[name]).replay()
    torch.cuda.synchronize()


def captured(work: Callable[[World], object]) -> torch.cuda.CUDAGraph:
    world, graph = World(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        world.there.add_(1)
        work(world)
    return graph


def test_forward_and_backward_become_one_launch():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).cuda()
    pixels = torch.ones(1, 3, 16, 16, device="cuda")

    def gradients() -> None:
        network.zero_grad()
        network(pixels).sum().backward()

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.current_stream().wait_stream(stream)
    eager = [p.grad.clone() for p in network.parameters()]
    with torch.cuda.graph(graph):
        gradients()
    if null_cuda.loaded():
        null_cuda.reset()
        graph.replay()
        found = null_cuda.figures()
        assert found["graph_nodes"] > 10
        assert null_cuda.operations(found) == 1
        return
    graph.replay()
    for parameter, expected in zip(network.parameters(), eager, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
