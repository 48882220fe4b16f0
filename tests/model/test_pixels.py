"""How images enter: the size at test time is the loader's and torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.pixels import ImageSize
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
