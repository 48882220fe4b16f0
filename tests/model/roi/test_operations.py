"""RoI operations against a pure-Python reference, grids computed by hand, and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision

from contract import model as config
from model.build import build_roi_op
from model.cpu import native
from model.cpu.bins import align_by_bins
from model.roi.operations import Align, assign_levels
from tests.builders import one_box
from tests.model.arms import arms, records

KINDS = [*records(config.RoIOp), config.RoIAlign(aligned=False, samples=3)]


def bilinear(feature: torch.Tensor, y: float, x: float) -> float:
    """Values at the corners of cells; beyond one cell outside 0, before that the border's value."""
    height, width = feature.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    dy, dx = y - top, x - left
    f = feature
    return float(
        f[top, left] * (1 - dy) * (1 - dx)
        + f[top, left + 1] * (1 - dy) * dx
        + f[top + 1, left] * dy * (1 - dx)
        + f[top + 1, left + 1] * dy * dx
    )


def half_away(value: float) -> int:
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def reference(
    cfg: config.RoIOp, feature: torch.Tensor, box: list[float], side: int, scale: float
) -> torch.Tensor:
    """One map (H, W), one box, cell by cell and sample by sample."""
    result = torch.zeros(side, side)
    x0, y0, x1, y1 = (value * scale for value in box)
    if cfg.kind != "align":
        x0, y0, x1, y1 = (half_away(value) for value in (x0, y0, x1, y1))
        x1, y1 = max(x1, x0) + 1, max(y1, y0) + 1
    for i in range(side):
        for j in range(side):
            if cfg.kind == "pool":
                result[i, j] = pooled_bin(feature, (x0, y0, x1, y1), i, j, side)
                continue
            shift = 0.5 if cfg.kind == "warp" or cfg.aligned else 0.0
            samples = 2 if cfg.kind == "warp" else cfg.samples
            width, height = x1 - x0, y1 - y0
            if shift == 0:
                width, height = max(width, 1), max(height, 1)
            values = [
                bilinear(
                    feature,
                    y0 - shift + (i + (a + 0.5) / samples) * height / side,
                    x0 - shift + (j + (b + 0.5) / samples) * width / side,
                )
                for a in range(samples)
                for b in range(samples)
            ]
            result[i, j] = max(values) if cfg.reduce == "max" else sum(values) / len(values)
    return result


def pooled_bin(
    feature: torch.Tensor, cells: tuple[int, int, int, int], i: int, j: int, side: int
) -> float:
    x0, y0, x1, y1 = cells
    height, width = feature.shape
    top, bottom = y0 + math.floor(i * (y1 - y0) / side), y0 + math.ceil((i + 1) * (y1 - y0) / side)
    left, right = x0 + math.floor(j * (x1 - x0) / side), x0 + math.ceil((j + 1) * (x1 - x0) / side)
    part = feature[
        min(max(top, 0), height) : min(max(bottom, 0), height),
        min(max(left, 0), width) : max(right, 0),
    ]
    return float(part.max()) if part.numel() else 0.0


BOXES = [
    [4.0, 4.0, 60.0, 40.0],
    [-20.0, -9.0, 30.0, 33.3],
    [50.0, 30.0, 200.0, 300.0],
    [10.0, 10.0, 10.0, 10.0],
    [17.3, 8.1, 18.2, 9.9],
]


@pytest.mark.parametrize(
    "cfg", KINDS, ids=lambda c: "-".join(str(v) for v in c.model_dump().values())
)
@pytest.mark.parametrize("cells", [(12, 15), (30, 40)], ids=["small", "large"])
@pytest.mark.parametrize("training", [True, False])
def test_every_operation_equals_its_pure_python_reference(cfg, cells, training):
    feature = torch.randn(
        1, 2, *cells, generator=torch.Generator().manual_seed(0), requires_grad=training
    )
    rois = torch.cat([torch.zeros(len(BOXES), 1), torch.tensor(BOXES)], dim=1)
    crops = build_roi_op(cfg, 3, (4,))([feature], rois).detach()
    feature = feature.detach()
    for crop, box in zip(crops, BOXES, strict=True):
        for channel in range(2):
            expected = reference(cfg, feature[0, channel], box, 3, 0.25)
            torch.testing.assert_close(crop[channel], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "cfg", KINDS, ids=lambda c: "-".join(str(v) for v in c.model_dump().values())
)
def test_constant_features_crop_to_the_constant(cfg):
    crops = build_roi_op(cfg, 7, (4,))([torch.full((1, 8, 32, 32), 3.0)], one_box())
    torch.testing.assert_close(crops, torch.full((1, 8, 7, 7), 3.0))


@pytest.mark.parametrize(
    "cfg", KINDS, ids=lambda c: "-".join(str(v) for v in c.model_dump().values())
)
def test_features_have_the_right_gradient_and_coordinates_none(cfg):
    feature = torch.randn(
        1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    feature.requires_grad_()
    rois = torch.tensor(
        [[0.0, 2.0, 3.0, 15.0, 17.0], [0.0, 5.0, 5.0, 5.0, 5.0]], dtype=torch.float64
    )
    op = build_roi_op(cfg, 2, (4,))
    assert torch.autograd.gradcheck(lambda f: op([f], rois), feature, eps=1e-6, atol=1e-5)
    rois.requires_grad_()
    (gradient,) = torch.autograd.grad(op([feature], rois).sum(), rois, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_align_on_a_ramp_by_hand():
    ramp = torch.arange(25.0).view(1, 1, 5, 5)
    roi = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
    plain = Align(2, "mean", False)(ramp, roi, 1.0, 4)[0, 0]
    centred = Align(2, "mean", True)(ramp, roi, 1.0, 4)[0, 0]
    torch.testing.assert_close(plain[0], torch.tensor([7.5, 8.0, 8.5, 9.0]))
    torch.testing.assert_close(plain[:, 0], torch.tensor([7.5, 10.0, 12.5, 15.0]))
    torch.testing.assert_close(centred[0], torch.tensor([4.5, 5.0, 5.5, 6.0]))
    torch.testing.assert_close(centred[:, 0], torch.tensor([4.5, 7.0, 9.5, 12.0]))


def test_align_of_four_cells_and_its_gradient_by_hand():
    cells = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    crop = Align(2, "mean", True)(cells, torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]), 1.0, 2)
    torch.testing.assert_close(crop[0, 0], torch.tensor([[1.0, 1.25], [1.5, 1.75]]))
    (gradient,) = torch.autograd.grad(crop.sum(), cells)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([[3.0625, 0.4375], [0.4375, 0.0625]]))


def test_pooling_four_cells_gives_them_back():
    cells = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    crop = build_roi_op(config.RoIPool(), 2, (1,))(
        [cells], torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
    )
    assert torch.equal(crop, cells)


@pytest.mark.skipif(not native.available(), reason="model/cpu/native.c was not compiled")
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_sums_of_cells_equal_the_scattered_kernel(aligned, samples):
    generator = torch.Generator().manual_seed(samples)
    feature = torch.randn(3, 32, 9, 13, generator=generator, requires_grad=True)
    start = torch.rand(30, 2, generator=generator) * 200 - 30
    image = torch.randint(0, 3, (30, 1), generator=generator).float()
    rois = torch.cat(
        [image, start, start + torch.rand(30, 2, generator=generator) * 120 - 2], dim=1
    )
    ours = align_by_bins(feature, rois, 1 / 16, 7, samples, aligned)
    theirs = torchvision.ops.roi_align(feature, rois, (7, 7), 1 / 16, samples, aligned)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (one,), (other,) = (torch.autograd.grad((crop**2).sum(), feature) for crop in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", arms(config.RoIOp))
def test_rois_that_are_not_finite_read_no_memory_but_the_maps(kind):
    """A run that diverges ends by its guard, which finds a loss that is not finite; no crash."""
    feature = torch.ones(1, 16, 8, 8, requires_grad=True)
    rois = torch.tensor(
        [[0.0, math.nan, 0, 9, 9], [0, 0, -math.inf, 9, math.inf], [0, 1e38, 1e38, 3e38, 3e38]]
    )
    crops = build_roi_op(kind, 7, (4,))([feature], rois)
    crops.sum().backward()


def test_levels_follow_the_paper():
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 4000.0, 0.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert assign_levels(boxes, (4, 8, 16, 32)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]
    assert assign_levels(boxes, (8, 16)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "cfg",
    [*KINDS, config.RoIAlign(samples=0)],
    ids=lambda c: "-".join(str(v) for v in c.model_dump().values()),
)
def test_all_levels_in_fixed_shapes_equal_level_by_level(cfg):
    op = build_roi_op(cfg, 7, (4, 8, 16, 32))
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, 3, 64 // s, 64 // s, generator=generator, requires_grad=True)
        for s in (1, 2, 4, 8)
    ]
    sides = torch.tensor([0.0, 20.0, 120.0, 200.0, 230.0, 250.0])
    rois = torch.stack(
        [torch.arange(6) % 2, sides * 0, sides * 0 + 3, sides, sides + 3], dim=1
    ).float()
    levels = assign_levels(rois[:, 1:], op.strides)
    ours, theirs = op._all_levels(maps, rois, levels), op._by_level(maps, rois, levels)
    torch.testing.assert_close(ours, theirs)
    grown = torch.randn(ours.shape, generator=generator)
    one, other = (torch.autograd.grad(crops, maps, grown) for crops in (ours, theirs))
    torch.testing.assert_close(one, other)


def test_several_levels_equal_torchvisions_pooler():
    maps = {str(i): torch.randn(2, 5, 128 // s, 160 // s) for i, s in enumerate((1, 2, 4, 8))}
    generator = torch.Generator().manual_seed(0)
    boxes = [
        torch.rand(20, 4, generator=generator) * torch.tensor([300.0, 200, 300, 300])
        for _ in range(2)
    ]
    boxes = [torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1) for b in boxes]
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    theirs = pooler(maps, boxes, [(512, 640), (512, 640)])
    rois = torch.cat(
        [torch.cat([torch.full((20, 1), float(i)), b], dim=1) for i, b in enumerate(boxes)]
    )
    op = build_roi_op(config.RoIAlign(aligned=False), 7, (4, 8, 16, 32))
    torch.testing.assert_close(op(list(maps.values()), rois), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "cfg", KINDS, ids=lambda c: "-".join(str(v) for v in c.model_dump().values())
)
def test_no_rois_give_no_crops_and_a_zero_gradient(cfg):
    maps = [torch.randn(1, 2, s, s, requires_grad=True) for s in (8, 4)]
    crops = build_roi_op(cfg, 7, (4, 8))(maps, torch.zeros(0, 5))
    assert crops.shape == (0, 2, 7, 7)
    crops.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps)
