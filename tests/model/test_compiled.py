"""The step on a GPU (no sync, bf16, compiled, memory) and what `torch.compile` takes of it on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.model import KeypointBranch, MaskBranch, SoftmaxMask
from contract.presets import preset
from model.build import build_detector
from model.detector import Detector
from tests.model.batches import shape_batch, with_padding
from tests.model.test_detector import total

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ARMS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax-keypoints": {
        "mask": MaskBranch(loss=SoftmaxMask(others="own_class")),
        "keypoints": KeypointBranch(num_keypoints=3, convs=1, width=16),
    },
}


def tiny(arm: str) -> Detector:
    return build_detector(preset("tiny").model_copy(update=ARMS[arm]))


def static_part(detector: Detector) -> Callable[[Tensor], tuple[Any, Any]]:
    """Pixels to maps and the RPN's outputs: the part in which no choice depends on data."""

    def run(pixels: Tensor) -> tuple[Any, Any]:
        maps, outputs = detector._read(detector.normalise(pixels))
        assert outputs is not None
        return maps, (outputs.logits, outputs.offsets)

    return run


@pytest.mark.slow
def test_the_static_part_compiles_whole_on_the_cpu():
    detector = build_detector(preset("tiny"))
    pixels = shape_batch().images
    plain = static_part(detector)
    compiled = torch.compile(plain, fullgraph=True)
    (maps, outputs), (expected_maps, expected) = compiled(pixels), plain(pixels)
    for ours, theirs in zip(
        [*maps.rpn, *outputs[0], *outputs[1]],
        [*expected_maps.rpn, *expected[0], *expected[1]],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.stack([m.square().mean() for m in maps.rpn]).sum().backward()
    gradient = detector.backbone.conv1.weight.grad.clone()
    detector.zero_grad()
    torch.stack([m.square().mean() for m in plain(pixels)[0].rpn]).sum().backward()
    expected_gradient = detector.backbone.conv1.weight.grad
    error = (
        gradient - expected_gradient
    ).norm() / expected_gradient.norm()  # a ReLU near 0 may fall either way
    assert error < 1e-2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_on_a_gpu_never_wait_for_the_host(arm, bf16):
    detector = tiny(arm).cuda()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=1e-4, fused=True)
    batches = [
        with_padding(shape_batch(seed=seed, num_keypoints=3), 2).to("cuda") for seed in range(3)
    ]

    def step(batch: Any) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = total(detector.losses(batch))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [step(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(found).isfinite().all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("arm", ARMS)
def test_a_gpu_gives_the_cpus_losses_and_counts(arm):
    detector, batch = tiny(arm), shape_batch(num_keypoints=3)
    expected = detector.losses(batch)
    found = detector.cuda().losses(batch.to("cuda"))
    assert found.keys() == expected.keys()
    for name, term in found.items():
        assert abs(float(term.count) - float(expected[name].count)) <= 0.05 * float(
            expected[name].count
        ), name
        mean = float(term.sum.detach()) / float(term.count)
        assert mean == pytest.approx(
            float(expected[name].sum.detach()) / float(expected[name].count), rel=0.1
        ), name


@pytest.mark.gpu
@needs_gpu
def test_the_static_part_compiles_whole_on_a_gpu():
    detector = build_detector(preset("tiny")).cuda()
    pixels = shape_batch().images.cuda()
    plain = static_part(detector)
    (maps, _), (expected, _) = torch.compile(plain, fullgraph=True)(pixels), plain(pixels)
    for ours, theirs in zip(maps.rpn, expected.rpn, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_memory_does_not_grow_with_the_objects_of_an_image():
    """Fixed shapes: only the padded targets grow, and they are small."""
    detector = build_detector(preset("tiny")).cuda()

    def peak(objects: int) -> int:
        batch = shape_batch(objects=objects).to("cuda")
        total(detector.losses(batch)).backward()
        torch.cuda.reset_peak_memory_stats()
        total(detector.losses(batch)).backward()
        return torch.cuda.max_memory_allocated()

    assert peak(50) < 1.15 * peak(10)
