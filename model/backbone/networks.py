"""Torchvision's image networks as lists of feature maps, with norms folded, grouped or trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

RESNETS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (torchvision.models.resnet.BasicBlock, (2, 2, 2, 2)),
    34: (torchvision.models.resnet.BasicBlock, (3, 4, 6, 3)),
    50: (torchvision.models.resnet.Bottleneck, (3, 4, 6, 3)),
    101: (torchvision.models.resnet.Bottleneck, (3, 4, 23, 3)),
}
STAGES = ("layer1", "layer2", "layer3", "layer4")  # res2 to res5


class Geometry(TypedDict):
    """All arguments of a convolution but its bias."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]


def geometry(conv: nn.Conv2d) -> Geometry:
    """The arguments that make a convolution like this one."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": cast(tuple[int, int], conv.kernel_size),
        "stride": cast(tuple[int, int], conv.stride),
        "padding": cast(str | tuple[int, int], conv.padding),
        "dilation": cast(tuple[int, int], conv.dilation),
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }


class FoldedConv2d(nn.Conv2d):
    """A bias-free convolution followed by frozen batch-norm.

    Training folds both into one convolution. That costs a pass over the weights; a separate norm
    costs two passes over the activations and their gradients. Inference keeps them apart, so that
    it rounds as other implementations do.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, conv: nn.Conv2d, eps: float) -> None:
        """Shares the weights of `conv`; the norm is the identity until statistics are loaded."""
        # On the meta device a layer draws no random number and takes no memory.
        super().__init__(**geometry(conv), bias=False, device="meta")
        self.weight = conv.weight
        self.eps = eps
        # Buffers and not parameters: no optimiser moves a frozen norm, and checkpoints keep it.
        self.register_buffer("norm_weight", torch.ones(conv.out_channels))
        self.register_buffer("norm_bias", torch.zeros(conv.out_channels))
        self.register_buffer("running_mean", torch.zeros(conv.out_channels))
        self.register_buffer("running_var", torch.ones(conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the normalised outputs."""
        if not self.training:
            x = cast(Tensor, self._conv_forward(x, self.weight, None))
            norm = (self.running_mean, self.running_var, self.norm_weight, self.norm_bias)
            return F.batch_norm(x, *norm, training=False, eps=self.eps)
        scale = self.norm_weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.norm_bias - self.running_mean * scale
        weight = self.weight * scale[:, None, None, None]
        return cast(Tensor, self._conv_forward(x, weight, shift))


class ConvReLU(nn.Module):
    """A convolution and its ReLU as a part: `model.gpu` has a faster one."""

    def forward(self, conv: nn.Module, x: Tensor) -> Tensor:
        """relu(conv(x))."""
        return F.relu(conv(x), inplace=True)


def fold_norms(network: nn.Module, eps: float) -> None:
    """Puts one `FoldedConv2d` in the place of every (conv, norm) pair of a torchvision ResNet."""
    # The stem is a block too: it has a conv1 and a bn1.
    for block in [network, *(m for stage in STAGES for m in getattr(network, stage))]:
        for name in ("conv1", "conv2", "conv3"):
            if hasattr(block, name):
                setattr(block, name, FoldedConv2d(getattr(block, name), eps))
                setattr(block, name.replace("conv", "bn"), nn.Identity())
        if getattr(block, "downsample", None) is not None:
            conv = cast(nn.Sequential, block.downsample)[0]
            block.downsample = nn.Sequential(FoldedConv2d(cast(nn.Conv2d, conv), eps))


def move_strides_to_1x1(network: nn.Module) -> None:
    """Moves the stride of a downsampling bottleneck from its 3x3 to its first 1x1.

    The original ResNet (MSRA) has it there.
    """
    for stage in STAGES[1:]:
        block = getattr(network, stage)[0]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


class ResNetMaps(nn.Module):
    """The maps of the first stages of a torchvision ResNet or ResNeXt, strides 4 to 32."""

    def __init__(self, network: Any, stages: int, frozen_stages: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = network.conv1, network.bn1
        for name in STAGES[:stages]:
            self.add_module(name, getattr(network, name))
        self.stage_names = STAGES[:stages]
        # One frozen stage is the stem, which is two modules.
        for name in ("conv1", "bn1", *STAGES)[: 1 + frozen_stages if frozen_stages else 0]:
            if name in ("conv1", "bn1", *self.stage_names):
                getattr(self, name).requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to one map of each stage, finest first."""
        x = F.max_pool2d(self.bn1(self.conv1(images)), kernel_size=3, stride=2, padding=1)
        # After the pooling and not before it: the same numbers and gradients from a quarter of the
        # cells.
        x = F.relu(x, inplace=True)
        maps = []
        for name in self.stage_names:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps


class VGGMaps(nn.Module):
    """conv5_3 of VGG-16, stride 16: the features before the last max pooling."""

    def __init__(self, frozen_blocks: int) -> None:
        super().__init__()
        # Without the last pooling and the classifier.
        self.features = torchvision.models.vgg16(weights=None).features[:30]
        starts = [
            0,
            5,
            10,
            17,
            24,
            30,
        ]  # where the five convolution blocks begin in torchvision's list
        self.features[: starts[frozen_blocks]].requires_grad_(False)
        self.conv_relu = ConvReLU()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to the only map."""
        x = images
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # a ReLU follows each
                x = self.conv_relu(layer, x)
            elif not isinstance(layer, nn.ReLU):
                x = layer(x)
        return [x]


def keep_resolution(stage: Any) -> None:
    """Sets stride 1 in the first block of a ResNet stage, wherever its stride was."""
    for conv in (stage[0].conv1, stage[0].conv2, stage[0].downsample[0]):
        conv.stride = (1, 1)


def resnet(
    block: type[nn.Module], layers: Sequence[int], groups: int, width: int, norm: NormLayer | None
) -> nn.Module:
    """A torchvision residual network without weights.

    `norm` None leaves its own batch-norm, to be folded.
    """
    network: nn.Module = torchvision.models.ResNet(
        block, list(layers), groups=groups, width_per_group=width, norm_layer=norm
    )
    return network


def feature_channels(network: Any) -> list[int]:
    """Channels of C2 to C5."""
    # Bottlenecks end in conv3, basic blocks in conv2.
    last = "conv3" if hasattr(network.layer1[0], "conv3") else "conv2"
    return [getattr(getattr(network, stage)[-1], last).out_channels for stage in STAGES]
