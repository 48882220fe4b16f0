"""Backbone and FPN of `r50-fpn` on a GPU: torch's kernels, ours, cuDNN's fused calls, Inductor.

    python benchmarks/gpu_backbone.py --json

In bf16 under autocast and channels-last, 8 images of 800 x 1344. Forward, and forward with
backward, as medians of CUDA events; "graph" is the latter in a CUDA graph, which leaves the host
out. Errors are relative to float32. A way that fails is told in its place.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contract.presets import preset
from model.build import build_detector
from model.gpu import convolution, epilogue
from model.gpu.accelerate import swap
from model.gpu.usable import complaints, kernels

WAYS = ("torch", "ours", "cudnn", "compile")


class Network(nn.Module):
    """Images to the pyramid's levels."""

    def __init__(self) -> None:
        super().__init__()
        detector = build_detector(preset("r50-fpn"))
        self.backbone, self.layout = detector.backbone, detector.layout

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.layout(self.backbone(images)).rpn)


def by_cudnn(
    terms: Sequence[tuple[convolution.Layer, Tensor, Tensor]],
    biases: Sequence[Tensor],
    other: Tensor | None,
    relu: bool,
) -> Tensor:
    """`model.gpu.convolution._summed` in one call of cuDNN, where it has one."""
    (layer, x, weight), *rest = terms
    if not relu or layer.transposed or x.shape[1] % 8:
        return OURS(terms, biases, other, relu)
    bias = (biases[0] + biases[1] if len(biases) > 1 else biases[0]).to(x.dtype)
    how = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if rest:
        other = convolution.run(*rest[0])
    if other is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *how)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *how)


OURS = convolution._summed


class Measured:
    """One way to run the network: times, and what it computes."""

    def __init__(self, network: nn.Module, images: Tensor, repeats: int) -> None:
        self.network, self.images, self.repeats = network, images, repeats
        self.trained = [p for p in network.parameters() if p.requires_grad]

    def forward(self) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return self.network(self.images)

    def step(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        levels = self.forward()
        torch.autograd.backward(levels, [self.weight(level) for level in levels])

    def weight(self, level: Tensor) -> Tensor:
        """The gradient of a level: its own values, scaled."""
        return level.detach() * (1e-3 / level.shape[1])

    def median_ms(self, work: Callable[[], Any]) -> float:
        for _ in range(2):
            work()
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return round(statistics.median(times), 3)

    def graph_ms(self) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return self.median_ms(graph.replay)

    def values(self) -> list[Tensor]:
        self.step()
        gradients = [p.grad.detach().float() for p in self.trained if p.grad is not None]
        return [*(level.detach().float() for level in self.forward()), *gradients]

    def figures(self, exact: list[Tensor]) -> dict[str, Any]:
        began = time.perf_counter()
        # Memory that a kernel reads and should not: its numbers would show.
        torch.full((1 << 28,), torch.nan, device="cuda", dtype=torch.bfloat16)
        errors = [
            ((a - b).norm() / b.norm()).item() for a, b in zip(self.values(), exact, strict=True)
        ]
        result = {
            "max_error": max(errors),
            "median_error": statistics.median(errors),
            "first_s": round(time.perf_counter() - began, 1),
        }
        torch.cuda.reset_peak_memory_stats()
        result["forward_ms"] = self.median_ms(self.forward)
        result["forward_backward_ms"] = self.median_ms(self.step)
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["graph_ms"] = attempt(self.graph_ms)
        return result


def attempt(work: Callable[[], Any]) -> Any:
    """What it returns, or what it raises in one line."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - a way that fails is a result
        torch.cuda.synchronize()
        return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]


def exact_values(network: Network, images: Tensor) -> list[Tensor]:
    """In float32 without TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        measured = Measured(network, images, 1)
        measured.forward = lambda: network(images)  # type: ignore[method-assign]
        return measured.values()


def run_way(way: str, images: Tensor, exact: list[Tensor], args: argparse.Namespace) -> Any:
    network: nn.Module = Network().cuda().train()
    if way in ("ours", "cudnn"):
        swap(network)
    convolution._summed = by_cudnn if way == "cudnn" else OURS
    if way == "compile":
        network = torch.compile(network)  # type: ignore[assignment]
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(args.compile_s)
    try:
        return attempt(lambda: Measured(network, images, args.repeats).figures(exact))
    finally:
        signal.alarm(0)
        convolution._summed = OURS


def too_long(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's own
    raise TimeoutError("compiling takes longer than --compile-s")


def kernel_gb_s(images: int, repeats: int) -> dict[str, Any]:
    """What of the memory's bandwidth the passes reach on res2's largest maps, by tile."""
    shape = (images, 256, 200, 336)
    maps, other, y = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(
            memory_format=torch.channels_last
        )
        for _ in range(3)
    )
    bias = torch.randn(256, device="cuda")
    gb = maps.numel() * 2 / 1e9
    passes: dict[str, tuple[float, Callable[[], Any]]] = {
        "bias_relu": (2, lambda: epilogue.finish(maps, [bias])),
        "bias_sum_relu": (3, lambda: epilogue.finish(maps, [bias], other)),
        "mask": (3, lambda: epilogue.masked_sum([other], y, with_bias=False)),
        "mask_of_two": (4, lambda: epilogue.masked_sum([other, maps], y, with_bias=False)),
        "mask_and_bias": (3, lambda: epilogue.masked_sum([other], y, with_bias=True)),
        "torch_relu": (2, lambda: torch.relu_(maps)),
    }
    measured = Measured(nn.Identity(), maps, repeats)
    result: dict[str, Any] = {}
    before = epilogue._TILE
    for tile in (2048, 4096, 8192):
        epilogue._TILE = tile
        result[str(tile)] = {
            name: attempt(lambda c=count, w=work: round(1e3 * c * gb / measured.median_ms(w)))
            for name, (count, work) in passes.items()
        }
    epilogue._TILE = before
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--compile-s", type=int, default=20, help="then Inductor is left out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    shape = (args.images, 3, args.height, args.width)
    images = torch.randn(shape, device="cuda").to(memory_format=torch.channels_last)
    exact = exact_values(Network().cuda().train(), images)
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "images": list(shape),
        "kernels": [kernels(), *complaints()],
        "gb_s_by_tile": attempt(lambda: kernel_gb_s(args.images, args.repeats)),
    }
    for way in args.ways.split(","):
        result[way] = run_way(way, images, exact, args)
        print(f"{way}: {result[way]}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(result))
        return
    for name, found in result.items():
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
