"""Convolutions by our own ways: the library's numbers, whatever the shape and however the work is cut."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import winograd
from model.build import build_detector
from model.config import preset
from model.convolution import Convolution, take_fast_convolutions
from tests.model.batches import shape_batch
from tests.model.test_detector import total

CHANNELS_LAST = torch.channels_last
SHAPES = [(1, 2, 3, 5, 6), (2, 3, 2, 4, 4), (1, 2, 2, 13, 9), (3, 1, 1, 1, 1), (2, 2, 2, 3, 17), (0, 2, 2, 8, 8)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("band", [1, 2**21])
@pytest.mark.parametrize(("images", "channels", "outputs", "height", "width"), SHAPES)
def test_winograd_is_the_convolution(monkeypatch, band, images, channels, outputs, height, width):
    monkeypatch.setattr(winograd, "_BAND_NUMBERS", band)
    x, weight = drawn(images, channels, height, width), drawn(outputs, channels, 3, 3)
    ours, expected = winograd.convolve(x, weight), F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(gradients(ours, (x, weight)), gradients(expected, (x, weight)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_winograd_rounds_no_worse_than_twice_the_library():
    x, weight = drawn(2, 128, 40, 33, dtype=torch.float32).detach(), drawn(128, 128, 3, 3, dtype=torch.float32).detach()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    ours, library = (
        (y - exact).square().mean().sqrt() for y in (winograd.convolve(x, weight), F.conv2d(x, weight, padding=1))
    )
    assert ours < 2 * library


def test_only_what_is_wanted_is_differentiated():
    x, weight = drawn(1, 2, 8, 8), drawn(2, 2, 3, 3)
    for fixed, wanted in ((x, weight), (weight, x)):
        y = winograd.convolve(*(t.detach() if t is fixed else t for t in (x, weight)))
        expected = F.conv2d(x, weight, padding=1)
        torch.testing.assert_close(gradients(y, (wanted,)), gradients(expected, (wanted,)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 5, "padding": "same"},
        {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"},
    ],
)
def test_a_layer_gives_what_it_gave(how, bias):
    layer = nn.Conv2d(128, 128, **how, bias=bias)
    x = drawn(2, 128, 34, 32, dtype=torch.float32).detach().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    before = layer(x)
    expected = gradients(before, (x, *layer.parameters()))
    take_fast_convolutions(nn.Sequential(layer))
    assert isinstance(layer, Convolution)
    after = layer(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(gradients(after, (x, *layer.parameters())), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    layer(x).mul_(2)  # as a residual block, in place


def test_a_number_that_is_not_finite_stays_in_its_image():
    x, weight = drawn(2, 2, 8, 9), drawn(2, 2, 3, 3)
    broken = x.detach().clone()
    broken[0, 0, 3, 3] = math.nan
    ours = winograd.convolve(broken, weight)
    assert torch.equal(ours[1], winograd.convolve(x, weight)[1])
    assert ours[0].isnan().any()


def test_what_is_not_a_batch_of_maps_is_the_librarys():
    layer = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    take_fast_convolutions(layer)
    x = drawn(128, 40, 40, dtype=torch.float32)
    assert layer(x).shape == (128, 40, 40)
    with pytest.raises(RuntimeError, match="to have 128 channels, but got 64"):
        layer(x[None, :64])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x[None]).dtype == torch.bfloat16


def test_a_copy_and_a_pickle_of_a_detector_compute_the_same():
    detector, batch = build_detector(preset("tiny")), shape_batch(images=1)
    expected = total(detector.losses(batch))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(total(other.losses(batch)), expected)


def test_evaluation_takes_the_library_for_all_that_chooses_boxes(monkeypatch):
    detector, batch, taken = build_detector(preset("r50-fpn-torchvision")), shape_batch(images=1, side=128), []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a: taken.append(a[1].shape) or convolve(*a))
    detector.settings = replace(detector.settings, score_threshold=0.0, nms_iou=0.9)
    detector.predict(batch)
    assert len(taken) == len(detector.mask.head.convs)
    detector.losses(batch)
    assert len(taken) > len(detector.mask.head.convs)


def test_a_detector_has_the_librarys_losses_and_gradients(monkeypatch):
    cfg = preset("r50-fpn").model_copy(update={"weights": preset("tiny").weights})
    detector, batch = build_detector(cfg), shape_batch(images=1, side=128)

    def step() -> tuple[Tensor, Tensor]:
        detector.zero_grad()
        loss = total(detector.losses(batch))
        loss.backward()
        return loss.detach(), detector.layout.output[0].weight.grad.clone()

    ours = step()
    monkeypatch.setattr("model.convolution._ours_to_choose", lambda *_: False)
    for found, wanted in zip(ours, step(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
