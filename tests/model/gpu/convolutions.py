"""What `test_convolution` runs in a process where Triton interprets its kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.backbone import layouts
from model.backbone.layouts import Pyramid
from model.backbone.networks import STAGES, FoldedConv2d, ResNetMaps, VGGMaps, fold_norms
from model.branches.mask import FCNHead
from model.gpu import epilogue, usable
from model.gpu.accelerate import swap
from model.gpu.backbone import is_folded
from model.gpu.convolution import convolved

LAST = torch.channels_last
usable.tried.update(convolution="", mask="")
epilogue._TILE = 1 << 11  # more programs than one, and not too many


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def folded(conv: nn.Conv2d) -> FoldedConv2d:
    layer = FoldedConv2d(conv, 1e-3)
    for buffer in layer.buffers():
        buffer.uniform_(0.5, 2.0)
    return layer


def gradients(y: torch.Tensor, of: list[torch.Tensor], seed: int = 7) -> list[torch.Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((y * weight).sum(), of, retain_graph=True))


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_layers() -> None:
    """One pixel, odd channels, strides, groups, a transposed one, and what may follow."""
    torch.manual_seed(0)
    layers = (
        (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 4, 5)),
        (nn.Conv2d(4, 7, 1), (1, 4, 1, 1)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 5, 3)),
        (nn.Conv2d(3, 4, (1, 3), bias=False), (1, 3, 3, 4)),
        (folded(nn.Conv2d(3, 260, 1, bias=False)), (2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 3, 2, stride=2), (2, 4, 3, 2)),
        (nn.Conv2d(4, 4, 3, padding=1), (0, 4, 3, 3)),
    )
    for (layer, shape), (relu, residual) in product(layers, ((True, True), (False, False))):
        x = draw(*shape).to(memory_format=LAST).requires_grad_()
        expected = layer(x)
        other = draw(*expected.shape).requires_grad_() if residual else None
        expected = expected if other is None else expected + other
        expected = F.relu(expected) if relu else expected
        (found,) = convolved([(layer, x)], other, relu)
        close([found], [expected])
        assert epilogue.is_channels_last(found)
        inputs = [x, *layer.parameters(), *([] if other is None else [other])]
        close(gradients(found, inputs), gradients(expected, inputs))
        grads = gradients(found, [layer.weight])
        assert grads[0].stride() == layer.weight.stride()


def check_sums_and_copies() -> None:
    """Two convolutions, three readers, and a resized level above."""
    torch.manual_seed(1)
    one, two = folded(nn.Conv2d(3, 4, 1, bias=False)), folded(nn.Conv2d(2, 4, 3, 2, 1, bias=False))
    x, z = draw(2, 3, 4, 3).requires_grad_(), draw(2, 2, 7, 5).requires_grad_()
    inputs = [x, z, one.weight, two.weight]
    expected = F.relu(one(x) + two(z))
    for copies in (1, 2, 3):
        found = convolved([(one, x), (two, z)], copies=copies)
        close(list(found), [expected] * copies)
        read = sum((n + 1) * copy.square() for n, copy in enumerate(found))
        total = sum(n + 1 for n in range(copies))
        close(gradients(read, inputs), gradients(total * expected.square(), inputs))
    merge = copy.deepcopy(nn.ModuleList([layouts.Merge()]))
    swap(merge)
    lateral = nn.Conv2d(3, 4, 1)
    for low in ((2, 2), (1, 1), (3, 2), (2, 1)):
        x = draw(2, 3, 4, 2 if low == (2, 1) else 3).requires_grad_()
        above = draw(2, 4, *low).requires_grad_()
        inputs = [x, above, *lateral.parameters()]
        found, expected = merge[0](lateral, x, above), layouts.Merge()(lateral, x, above)
        close([found], [expected])
        close(gradients(found, inputs), gradients(expected, inputs))


def check_mask_head() -> None:
    """Each RoI's own mask, of 0 to 3 RoIs and of more channels than a program takes."""
    torch.manual_seed(5)
    for rois, convs, width in ((2, 0, 260), (3, 1, 5), (0, 1, 4)):
        theirs = FCNHead(3, convs, width, 4)
        ours = copy.deepcopy(nn.ModuleList([theirs]))
        swap(ours)
        x = draw(rois, 3, 3, 2).requires_grad_()
        channel = torch.arange(rois) % 4
        maps, grads = [], []
        for head in (ours[0], theirs):
            own = head.own(x, channel)
            maps.append(own)
            grads.append(gradients(own, [x, *head.parameters()]))
        close(maps[:1], maps[1:])
        close(grads[0], grads[1])
        assert list(ours[0].state_dict()) == list(theirs.state_dict())


def check_nan_and_pools() -> None:
    torch.manual_seed(2)
    maps = draw(1, 5, 5, 4).to(memory_format=LAST)
    maps[0, 2, 1, 1] = torch.nan
    bias = draw(5)
    whole = F.relu(F.max_pool2d(maps + bias[:, None, None], 3, 2, 1))
    torch.testing.assert_close(epilogue.pool_relu(maps, bias), whole, equal_nan=True)
    finished = epilogue.finish(maps.clone(memory_format=LAST), [bias])
    torch.testing.assert_close(finished, F.relu(maps + bias[:, None, None]), equal_nan=True)
    nothing = epilogue.pool_relu(draw(0, 5, 5, 4), bias)
    assert nothing.shape == (0, 5, 3, 2)
    for rows in (1, 800):  # more than one partial sum
        given = draw(1, 9, rows, 3).to(memory_format=LAST)
        y = F.relu(draw(1, 9, rows, 3)).to(memory_format=LAST)
        masked, total = epilogue.masked_sum([given, given], y, with_bias=True)
        expected = torch.where(y > 0, 2 * given, 0.0)
        torch.testing.assert_close(masked, expected)
        torch.testing.assert_close(total, expected.sum((0, 2, 3)), rtol=1e-4, atol=1e-3)


class SmallResNet(nn.Module):
    """torchvision's blocks on few channels: the interpreter takes long for many."""

    def __init__(self, block: type[nn.Module], norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), norm(4)
        width = 4
        for number, name in enumerate(STAGES):
            planes = 2 << number
            out, stride = planes * block.expansion, 1 if number == 0 else 2
            around = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), norm(out))
            first = block(width, planes, stride, around, norm_layer=norm)
            stage = [first, block(out, planes, norm_layer=norm)] if number == 1 else [first]
            self.add_module(name, nn.Sequential(*stage))
            width = out


def small_resnet(block: type[nn.Module], norm: Callable[[int], nn.Module] | None) -> nn.Module:
    if norm is not None:
        return SmallResNet(block, norm)
    network = SmallResNet(block, nn.BatchNorm2d)
    fold_norms(network, 1e-5)
    for layer in network.modules():
        if isinstance(layer, FoldedConv2d):
            layer.norm_weight.uniform_(0.5, 1.0)
            layer.norm_bias.uniform_(-0.1, 0.1)
    return network


def check_networks() -> None:
    """Whole networks, in training and in evaluation, whose modules `swap` replaced."""
    torch.manual_seed(3)
    maps = ResNetMaps(small_resnet(Bottleneck, None), 2, frozen_stages=1)
    compare(nn.Sequential(maps, Pyramid([8, 16], 3, (0,), 0)))
    compare(nn.Sequential(ResNetMaps(small_resnet(BasicBlock, None), 1, frozen_stages=0)))
    with_groups = small_resnet(BasicBlock, partial(nn.GroupNorm, 2))
    assert not is_folded(ResNetMaps(with_groups, 2, frozen_stages=0))
    vgg = VGGMaps(1)
    vgg.features = nn.Sequential(
        *(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU())
    )
    compare(nn.Sequential(vgg))
    res5 = nn.Sequential(small_resnet(Bottleneck, None).layer1)  # C4's head
    for training in (True, False):
        compare(res5, draw(3, 4, 5, 6), training)


def compare(
    torchs: nn.Sequential, images: torch.Tensor | None = None, training: bool = True
) -> None:
    ours = copy.deepcopy(torchs)
    swap(ours)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    images = draw(1, 3, 20, 28) if images is None else images
    maps, grads = [], []
    for net in (ours, torchs):
        found = net.train(training)(images.to(memory_format=LAST))
        found = [found] if isinstance(found, torch.Tensor) else getattr(found, "rpn", found)
        loss = sum((m * torch.cos(torch.arange(m.numel()).view_as(m))).sum() for m in found)
        trained = [p for p in net.parameters() if p.requires_grad]
        maps.append(found)
        grads.append(torch.autograd.grad(loss, trained))
    close(maps[0], maps[1])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def check_half() -> None:
    """Under autocast: no further from float32 than torch's own path.

    In fp16, since the interpreter truncates to bf16 where a GPU rounds.
    """
    torch.manual_seed(4)
    layer = nn.Conv2d(16, 24, 3, padding=1)
    x, other = draw(2, 16, 6, 5).requires_grad_(), draw(2, 24, 6, 5).requires_grad_()
    inputs = [x, other, *layer.parameters()]
    y = F.relu(layer(x) + other)
    exact = [y, *gradients(y, inputs)]

    def errors(y: torch.Tensor) -> list[float]:
        found = [y, *gradients(y.float(), inputs)]
        assert all(g.dtype == torch.float32 for g in found[1:])
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    with torch.autocast("cpu", torch.float16):
        theirs, ours = F.relu(layer(x) + other.half()), convolved([(layer, x)], other)[0]
    assert ours.dtype == torch.float16
    for a, b in zip(errors(ours), errors(theirs), strict=True):
        assert a < 1.1 * b + 1e-5, (a, b)
