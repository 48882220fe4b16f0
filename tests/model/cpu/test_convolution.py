"""The kernels give torch's numbers, whatever the shape and however the work is cut."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.presets import preset
from model.build import build_detector
from model.cpu import native, suppression, windows, winograd
from model.cpu.accelerate import accelerate, kernels, swap
from model.cpu.bins import align_by_bins, fits
from model.cpu.convolution import Convolution
from model.cpu.group_norm import GroupNorm
from model.detector import Detector
from tests.model.batches import shape_batch
from tests.model.test_detector import total

CHANNELS_LAST = torch.channels_last
SHAPES = [  # images, channels, outputs, height, width
    (1, 16, 48, 13, 9),
    (2, 48, 16, 8, 8),
    (9, 16, 16, 1, 1),
    (2, 16, 32, 3, 17),
    (3, 80, 16, 21, 22),
    (1, 16, 16, 50, 4),
    (2, 80, 144, 7, 7),  # one band of 36 tiles, and channels that are no multiple of a chunk
]

needs_kernels = pytest.mark.skipif(
    not native.available(), reason="model/cpu/native.c was not compiled"
)


def fast(layer: nn.Module) -> nn.Module:
    """The layer as `accelerate` makes it in a detector."""
    network = nn.Sequential(layer)
    swap(network)
    return network[0]


def accelerated(name: str) -> Detector:
    detector = build_detector(preset(name))
    accelerate(detector)
    return detector


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return torch.autograd.grad((y * weights).sum(), inputs)


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


def assert_rounds_to(found: Tensor, exact: Tensor, share: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, exact.float(), rtol=0, atol=share * float(exact.detach().abs().max())
    )


@needs_kernels
def test_a_library_of_another_native_c_is_not_used_and_a_warning_says_so(monkeypatch, tmp_path):
    """As on a node where the installation is older than the code that travelled there."""
    source = Path(native.__file__).with_suffix(".c")
    (tmp_path / "native.c").write_bytes(source.read_bytes() + b"/* edited */\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._load() is not None
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(UserWarning, match=r"compiled from another native\.c .* install maskray ag"):
        assert native._load() is None


def test_without_the_kernels_every_module_stays_torchs(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    detector = build_detector(preset("tiny"))
    before = list(detector.modules())
    assert accelerate(detector) == "torch"
    assert [id(module) for module in detector.modules()] == [id(module) for module in before]
    assert not [module for module in before if type(module).__module__.startswith("model.cpu")]


@needs_kernels
@pytest.mark.parametrize("name", ["tiny", "r50-fpn", "r50-c4"])
def test_accelerating_keeps_every_parameter_its_name_and_its_place(name):
    detector = build_detector(preset(name))
    parameters, state = dict(detector.named_parameters()), detector.state_dict(keep_vars=True)
    assert accelerate(detector) == kernels(torch.device("cpu")) == f"compiled {native.source():08x}"
    assert kernels(torch.device("cuda")) == "torch"
    for before, after in (
        (parameters, dict(detector.named_parameters())),
        (state, detector.state_dict(keep_vars=True)),
    ):
        assert list(before) == list(after)
        assert all(after[name] is value for name, value in before.items())
    assert {type(module) for module in detector.modules()}.isdisjoint(
        {nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm}
    )
    fast = list(detector.modules())
    accelerate(detector)
    assert [id(module) for module in detector.modules()] == [id(module) for module in fast]


@needs_kernels
@pytest.mark.parametrize("band", [1, 7, 36])
@pytest.mark.parametrize(("images", "channels", "outputs", "height", "width"), SHAPES)
def test_winograd_is_the_convolution(monkeypatch, band, images, channels, outputs, height, width):
    monkeypatch.setattr(winograd, "_BAND_TILES", band)
    x, weight = drawn(images, channels, height, width), drawn(outputs, channels, 3, 3)
    exact_inputs = doubles(x, weight)
    assert winograd.pays_off(x, weight)
    ours, exact = winograd.convolve(x, weight), F.conv2d(*exact_inputs, padding=1)
    assert ours.is_contiguous(memory_format=CHANNELS_LAST)
    assert_rounds_to(ours, exact)
    for found, wanted in zip(
        gradients(ours, (x, weight)), gradients(exact, exact_inputs), strict=True
    ):
        assert_rounds_to(found, wanted)


@needs_kernels
def test_a_single_band_gives_the_same_bits_as_several(monkeypatch):
    """It makes the weights' factors in chunks of channels; each sum goes on where it was."""
    x, weight = drawn(2, 80, 7, 7), drawn(144, 80, 3, 3)
    found = []
    for band in (36, 3):
        monkeypatch.setattr(winograd, "_BAND_TILES", band)
        y = winograd.convolve(x, weight)
        found.append((y, *gradients(y, (x,))))
    assert all(torch.equal(one, several) for one, several in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("size", [(1, 16, 16), (3, 5, 7)])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding"),
    [
        (3, 64, 7, 2, 3),
        (16, 32, 3, 2, 1),
        (48, 16, 1, 2, 0),
        (16, 48, 3, 1, 0),
        (32, 16, 5, 3, 4),
        (16, 16, 2, 2, 0),
    ],
)
def test_windows_are_the_convolution(size, channels, outputs, kernel, stride, padding):
    images, height, width = size
    x, weight = drawn(images, channels, height, width), drawn(outputs, channels, kernel, kernel)
    inputs = (weight,) if channels % 16 else (x, weight)
    exact_x, exact_weight = doubles(x, weight)
    exact_inputs = (exact_weight,) if channels % 16 else (exact_x, exact_weight)
    ours = windows.convolve(x.detach() if channels % 16 else x, weight, stride, padding)
    exact = F.conv2d(exact_x, exact_weight, stride=stride, padding=padding)
    assert_rounds_to(ours, exact)
    for found, wanted in zip(gradients(ours, inputs), gradients(exact, exact_inputs), strict=True):
        assert_rounds_to(found, wanted)


@needs_kernels
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (2, 3), (1, 1)])
def test_a_deconvolution_is_the_gradient_of_a_convolution(kernel, stride):
    layer = nn.ConvTranspose2d(32, 16, kernel, stride)
    exact_layer, x = copy.deepcopy(layer).double(), drawn(3, 32, 7, 5)
    (exact_x,) = doubles(x)
    layer = fast(layer)
    ours, exact = layer(x), exact_layer(exact_x)
    assert isinstance(layer, windows.Deconvolution)
    assert "maskray_deconvolution" in str(ours.grad_fn.next_functions)
    assert_rounds_to(ours, exact)
    wanted = gradients(exact, (exact_x, *exact_layer.parameters()))
    for found, gradient in zip(gradients(ours, (x, *layer.parameters())), wanted, strict=True):
        assert_rounds_to(found, gradient)


@needs_kernels
def test_threads_change_no_bit():
    x, weight = drawn(3, 32, 30, 29), drawn(48, 32, 3, 3)
    norm, rois = (
        GroupNorm(nn.GroupNorm(8, 32)),
        torch.tensor([[0.0, 3, 5, 40, 50], [2, 0, 0, 100, 90], [2, 9, 9, 9, 9]]),
    )
    few_boxes = torch.rand(4, 50, 2, generator=torch.Generator().manual_seed(0)) * 50
    lists, valid = (
        torch.cat([few_boxes, few_boxes + 20], dim=2),
        torch.ones(4, 50, dtype=torch.bool),
    )

    def everything() -> list[Tensor]:
        ys = [winograd.convolve(x, weight), windows.convolve(x, weight, 2, 1), norm(x)]
        ys.append(align_by_bins(x, rois, 0.25, 7, 2, True))
        found = [
            gradients(y, inputs)
            for y, inputs in zip(ys, [(x, weight), (x, weight), (x,), (x,)], strict=True)
        ]
        return [
            *ys,
            *(gradient for several in found for gradient in several),
            suppression.suppress(lists, valid, 0.5),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_winograd_rounds_no_worse_than_twice_the_library():
    x, weight = drawn(2, 128, 40, 33).detach(), drawn(128, 128, 3, 3).detach()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    ours, library = (
        (y - exact).square().mean().sqrt()
        for y in (winograd.convolve(x, weight), F.conv2d(x, weight, padding=1))
    )
    assert ours < 2 * library


@needs_kernels
def test_only_what_is_wanted_is_differentiated():
    x, weight = drawn(1, 16, 12, 12), drawn(16, 16, 3, 3)
    for convolve in (winograd.convolve, lambda x, weight: windows.convolve(x, weight, 1, 1)):
        for fixed, wanted in ((x, weight), (weight, x)):
            y = convolve(*(t.detach() if t is fixed else t for t in (x, weight)))
            (found,), (exact,) = (
                gradients(y, (wanted,)),
                gradients(F.conv2d(x, weight, padding=1), (wanted,)),
            )
            assert_rounds_to(found, exact)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 48, 30, 31), (3, 16, 2, 2), (2, 32, 200, 3)])
def test_group_norm_is_torchs(shape):
    norm, x = nn.GroupNorm(16, shape[1]), (drawn(*shape) * 3 + 5).detach().requires_grad_()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    exact_norm = copy.deepcopy(norm).double()
    (exact_x,) = doubles(x)
    norm = fast(norm)
    ours, exact = norm(x), exact_norm(exact_x)
    assert "maskray_group_norm" in str(ours.grad_fn)
    assert_rounds_to(ours, exact)
    wanted = gradients(exact, (exact_x, *exact_norm.parameters()))
    for found, gradient in zip(gradients(ours, (x, *norm.parameters())), wanted, strict=True):
        assert_rounds_to(found, gradient, 1e-4)  # sums of numbers that nearly cancel


def test_a_norm_on_what_is_no_map_is_torchs():
    norm, wrong, single = (fast(nn.GroupNorm(*sizes)) for sizes in ((2, 4), (4, 16), (4, 4)))
    assert norm(drawn(3, 4)).shape == (3, 4)
    assert norm.eval()(drawn(3, 4, 5, 5)).shape == (3, 4, 5, 5)
    with pytest.raises(RuntimeError):
        wrong(drawn(2, 64, 5, 5))
    with pytest.raises(ValueError, match="more than 1 value"):
        single(drawn(1, 4, 1, 1))


def test_a_deconvolution_of_nothing_is_torchs():
    layer = fast(nn.ConvTranspose2d(16, 16, 2, 2))
    with pytest.raises(RuntimeError):
        layer(drawn(1, 16, 0, 4))
    assert layer(drawn(0, 16, 3, 4)).shape == (0, 16, 6, 8)


@needs_kernels
def test_kernels_take_plain_floats_on_the_cpu_alone():
    x, rois = drawn(1, 16, 12, 12), torch.tensor([[0.0, 1, 1, 20, 20]])
    assert fits(x, rois, 2)
    assert not fits(x, rois.double(), 2)
    assert not fits(x.double(), rois.double(), 2)
    assert not native.takes(x.to("meta"))
    with torch.device("meta"):  # and with it what they write into
        assert winograd.convolve(x, torch.ones(16, 16, 3, 3, device="cpu")).device.type == "cpu"


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
    x = drawn(2, 128, 34, 32).detach().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    before = layer(x)
    expected = gradients(before, (x, *layer.parameters()))
    layer = fast(layer)
    assert isinstance(layer, Convolution)
    after = layer(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(gradients(after, (x, *layer.parameters())), expected, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.detach().abs().max())
        )
    layer(x).mul_(2)  # as a residual block, in place


@needs_kernels
def test_a_number_that_is_not_finite_stays_in_its_image():
    x, weight = drawn(2, 16, 8, 9), drawn(16, 16, 3, 3)
    broken = x.detach().clone()
    broken[0, 0, 3, 3] = math.nan
    ours = winograd.convolve(broken, weight)
    assert torch.equal(ours[1], winograd.convolve(x, weight)[1])
    assert ours[0].isnan().any()


def test_what_is_not_a_batch_of_maps_is_the_librarys():
    layer = fast(nn.Conv2d(128, 128, 3, padding=1))
    x = drawn(128, 40, 40)
    assert layer(x).shape == (128, 40, 40)
    assert layer(x[None][:0]).shape == (0, 128, 40, 40)
    with pytest.raises(RuntimeError, match="to have 128 channels, but got 64"):
        layer(x[None, :64])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x[None]).dtype == torch.bfloat16


def test_a_copy_and_a_pickle_of_a_detector_compute_the_same():
    detector, batch = accelerated("tiny"), shape_batch(images=1)
    expected = total(detector.losses(batch))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(total(other.losses(batch)), expected)


@needs_kernels
def test_evaluation_takes_the_library_for_all_that_chooses_boxes(monkeypatch):
    detector, batch = accelerated("r50-fpn-torchvision"), shape_batch(images=1, side=128)
    taken: list[torch.Size] = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a: taken.append(a[1].shape) or convolve(*a))
    monkeypatch.setattr(detector.box.selection, "score_threshold", 0.0)
    monkeypatch.setattr(detector.box.selection, "max_iou", 0.9)
    detector.predict(batch)
    assert len(taken) == len(detector.mask.head.convs)
    detector.losses(batch)
    assert len(taken) > len(detector.mask.head.convs)


@needs_kernels
def test_a_detector_has_torchs_losses_and_gradients():
    batch = shape_batch(images=2, side=128)

    def step(detector: Detector) -> tuple[Tensor, ...]:
        loss = total(detector.losses(batch))
        loss.backward()
        return loss.detach(), *(parameter.grad.clone() for parameter in detector.parameters())

    ours, torchs = step(accelerated("tiny")), step(build_detector(preset("tiny")))
    for found, wanted in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))


def operators() -> dict[str, tuple]:
    """Every operator of ours, with arguments that it takes."""
    x, weight = drawn(2, 16, 12, 12), drawn(32, 16, 3, 3)
    image, cells = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 2, 4, dtype=torch.int32)
    taps = (image, cells, torch.rand(3, 2, 4), cells, torch.rand(3, 2, 4))
    norm = (drawn(32), torch.zeros(32, requires_grad=True))
    boxes = torch.rand(2, 5, 4)
    return {
        "winograd": (x, weight),
        "windows": (x, weight, 1, 1),
        "deconvolution": (x, drawn(16, 32, 2, 2), 2),
        "group_norm": (drawn(2, 32, 12, 12), *norm, 4, 1e-5),
        "bins": (x, *taps),
        "nms": (boxes, torch.ones(2, 5, dtype=torch.bool), 0.5),
    }


@needs_kernels
@pytest.mark.parametrize("name", operators())
def test_torch_finds_nothing_wrong_with_our_operators(name):
    """Their schema, their shapes for tracers, and how they are differentiated."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.maskray, name), operators()[name], test_utils=checks)


@needs_kernels
@pytest.mark.parametrize("name", ["winograd", "windows", "deconvolution", "group_norm", "bins"])
def test_a_second_backward_pass_raises(name):
    """The kernels have no gradients of gradients; zeros in their place would train in silence."""
    arguments = operators()[name]
    result = getattr(torch.ops.maskray, name)(*arguments)
    y = result[0] if isinstance(result, tuple) else result
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.stack([gradient.sum() for gradient in first]).sum().backward()
