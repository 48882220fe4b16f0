"""The compiled kernels for a detector that trains on a CPU.

Nothing outside `model.cpu` knows of them.
"""

from __future__ import annotations

import torch
from torch import nn

from model.backbone.networks import FoldedConv2d
from model.branches.mask import OwnChannelProduct
from model.cpu import native, own_channel
from model.cpu.bins import BinMean
from model.cpu.convolution import Convolution, FoldedConvolution
from model.cpu.group_norm import GroupNorm
from model.cpu.suppression import ListSuppression
from model.cpu.windows import Deconvolution
from model.detector import Detector
from model.roi.operations import SampleMean
from model.rpn.nms import Suppression


def accelerate(detector: Detector) -> str:
    """Puts the kernels in place of torch's modules, if they were compiled; for a detector on a CPU.

    Parameters and buffers stay the same objects under the same names, so that optimisers,
    checkpoints and averages see no change. Returns `kernels` of its device.
    """
    device = next(detector.parameters()).device
    if device.type != "cpu" or not native.available():
        return kernels(device)
    for head in (detector.mask, detector.keypoints):
        if head is not None:  # it sees boxes that are already chosen: its rounding moves none
            swap(head, in_evaluation=True)
    swap(detector)
    detector.channels_last_on_cpu = True
    return kernels(device)


def kernels(device: torch.device) -> str:
    """What computes for an accelerated detector: "torch", or "compiled" and native.c's checksum."""
    compiled = device.type == "cpu" and native.available()
    return f"compiled {native.source():08x}" if compiled else "torch"


def swap(parent: nn.Module, in_evaluation: bool = False) -> None:
    """Replaces every module below `parent` that has a kernel."""
    for name, child in parent.named_children():
        fast = _fast(child, in_evaluation)
        if fast is None:
            swap(child, in_evaluation)
        else:
            setattr(parent, name, fast.train(child.training))


def _fast(module: nn.Module, in_evaluation: bool) -> nn.Module | None:
    """The module by kernels, or None if there is none.

    Types are compared exactly: a subclass does something of its own, and a swapped module is not
    swapped again.
    """
    if type(module) is nn.Conv2d:
        return Convolution(module, in_evaluation)
    if type(module) is FoldedConv2d:
        return FoldedConvolution(module)
    if type(module) is nn.ConvTranspose2d:
        return Deconvolution(module)
    if type(module) is nn.GroupNorm:
        return GroupNorm(module)
    if type(module) is SampleMean:
        return BinMean()
    if type(module) is Suppression:
        return ListSuppression(module.max_iou)
    if type(module) is OwnChannelProduct:
        return own_channel.OwnChannelProduct()
    return None
