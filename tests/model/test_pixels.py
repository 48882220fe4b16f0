"""How images enter: the size at test time is the loader's and torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.pixels import ImageSize, antialiased, antialiased_in_floats
from pipelines.load.images import resized_size, torchvision_size

LOADERS = {"antialias": resized_size, "torchvision-detection": torchvision_size}
SIDES = [*range(1, 1000, 7), 1333, 2048, 5000]


@pytest.mark.parametrize("resize", LOADERS)
@pytest.mark.parametrize(
    ("short", "longest"), [(800, 1333), (600, 1000), (128, 128), (64, 96), (50, 999)]
)
def test_an_image_has_the_same_size_as_in_the_evaluation_loader(resize, short, longest):
    image_size = ImageSize(short, longest, 32, resize)
    other = {
        (height, width)
        for height in SIDES
        for width in SIDES
        if image_size.of(height, width) != LOADERS[resize](height, width, short, longest)
    }
    assert not other


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((1, 5000), "antialias", (1, 1333)),
        ((1, 5000), "torchvision-detection", (1, 1333)),
        ((480, 640), "antialias", (800, 1067)),  # 1066.67
        ((480, 640), "torchvision-detection", (800, 1066)),
        ((64, 65), "antialias", (800, 813)),  # 812.5, half up
    ],
)
def test_sizes_by_hand(size, resize, expected):
    assert ImageSize(800, 1333, 32, resize).of(*size) == expected


@pytest.mark.parametrize("size", [(480, 640), (333, 250), (100, 260), (97, 31), (7, 11)])
def test_torchvisions_detectors_have_the_same_size(size):
    transform = GeneralizedRCNNTransform(128, 208, [0.0] * 3, [1.0] * 3).eval()
    theirs, _ = transform.resize(torch.zeros(3, *size), None)
    assert ImageSize(128, 208, 32, "torchvision-detection").of(*size) == tuple(theirs.shape[1:])


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((480, 640), (800, 1067)),
        ((333, 250), (128, 96)),
        ((100, 260), (37, 400)),
        ((600, 900), (64, 96)),
        ((1, 500), (1, 133)),
        ((7, 11), (31, 3)),
        ((50, 60), (50, 60)),
    ],
)
@pytest.mark.parametrize("contrast", ["noise", "black and white"])
def test_a_devices_pixels_are_the_cpus_within_one_level(size, resized, contrast):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    if contrast == "black and white":
        image = (image > 127).to(torch.uint8) * 255
    expected = antialiased(image, resized).int()
    found = antialiased_in_floats(image[None], resized)
    apart = (found.int() - expected).abs()
    assert found.dtype == torch.uint8
    assert apart.max() <= 1
    assert apart.float().mean() < 0.02  # the kernel's weights have 15 bits or so, ours 24
