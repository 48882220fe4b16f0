"""Residual networks with frozen norms and the FPN on a GPU, by `model.gpu.convolution`.

The modules of torchvision's blocks stay where they are: only how they are run is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.backbone.networks import FoldedConv2d, ResNetMaps
from model.gpu import epilogue
from model.gpu.convolution import before_shift, convolved, fits


def is_folded_stage(module: nn.Module) -> bool:
    """Whether the module is a stage of torchvision's own blocks with folded norms."""
    if type(module) is not nn.Sequential or not len(module):
        return False
    return all(_is_folded(block) for block in module)


def _is_folded(block: nn.Module) -> bool:
    if type(block) not in (Bottleneck, BasicBlock):
        return False
    convs = [conv for conv in block.modules() if isinstance(conv, nn.Conv2d)]
    norms = [getattr(block, name) for name in ("bn1", "bn2", "bn3") if hasattr(block, name)]
    return all(type(conv) is FoldedConv2d for conv in convs) and all(
        type(norm) is nn.Identity for norm in norms
    )


class Stage(nn.Sequential):
    """A stage of residual blocks (C4's res5)."""

    def forward(self, input: Tensor) -> Tensor:
        """As the blocks."""
        first = next(m for m in self.modules() if isinstance(m, FoldedConv2d))
        x = input
        if fits(first, x):
            (x,) = run_stage(self, x, x, 1)
            return x
        for block in self:
            x = block(x)
        return x


def run_stage(
    stage: Iterable[nn.Module], x: Tensor, same: Tensor, copies: int
) -> tuple[Tensor, ...]:
    """The blocks, of two copies of their input to `copies` of their output."""
    *blocks, last = stage
    for block in blocks:
        x, same = _run_block(block, x, same, 2)
    return _run_block(last, x, same, copies)


def _run_block(block: Any, x: Tensor, same: Tensor, copies: int) -> tuple[Tensor, ...]:
    """x, same: copies of the block's input, for its branch and for its sum."""
    *convs, last = [getattr(block, n) for n in ("conv1", "conv2", "conv3") if hasattr(block, n)]
    for conv in convs:
        (x,) = convolved([(conv, x)])
    if block.downsample is None:
        return convolved([(last, x)], same, copies=copies)
    return convolved([(last, x), (block.downsample[0], same)], copies=copies)


class FoldedResNetMaps(ResNetMaps):
    """A `ResNetMaps` whose norms are all folded."""

    def __init__(self, maps: ResNetMaps) -> None:
        """Shares the modules of `maps`."""
        nn.Module.__init__(self)
        for name, child in maps.named_children():
            self.add_module(name, child)
        self.stage_names = maps.stage_names

    def forward(self, images: Tensor) -> list[Tensor]:
        """As `ResNetMaps`."""
        if not fits(self.conv1, images):
            return super().forward(images)
        maps, first = [], self._stem(images)
        second = first
        for name in self.stage_names:
            # One copy is the map, two go to the next stage.
            m, first, second = run_stage(getattr(self, name), first, second, 3)
            maps.append(m)
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and (
            self.conv1.weight.requires_grad or images.requires_grad
        )
        if not trained:
            return epilogue.pool_relu(*before_shift(self.conv1, images))
        (x,) = convolved([(self.conv1, images)], relu=False)
        return nn.functional.relu(nn.functional.max_pool2d(x, 3, 2, 1), inplace=True)


def is_folded(maps: ResNetMaps) -> bool:
    """Whether `FoldedResNetMaps` computes what these maps would."""
    stages = [getattr(maps, name) for name in maps.stage_names]
    return type(maps.conv1) is FoldedConv2d and all(is_folded_stage(stage) for stage in stages)
