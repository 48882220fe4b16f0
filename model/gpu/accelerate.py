"""Our kernels for a detector on a GPU. Outside `model.gpu` nothing knows of Triton."""

from __future__ import annotations

from torch import nn

from model.backbone.layouts import Merge
from model.backbone.networks import ConvReLU, ResNetMaps
from model.detector import Detector
from model.gpu.usable import kernels, why_not
from model.rpn.nms import Suppression


def accelerate(detector: Detector) -> str:
    """Puts the kernels in place of torch's modules, where they work here.

    Parameters and buffers stay the same objects under the same names. Returns `kernels`.
    """
    swap(detector)
    return kernels()


def swap(parent: nn.Module) -> None:
    """Replaces every module below `parent` that has a kernel."""
    for name, child in parent.named_children():
        fast = _fast(child)
        if fast is None:
            swap(child)
        else:
            setattr(parent, name, fast.train(child.training))


def _fast(module: nn.Module) -> nn.Module | None:
    """The module by kernels, or None if there is none.

    Types are compared exactly: a subclass does something of its own, and a swapped module is not
    swapped again. Modules with kernels are imported here, since their import needs Triton.
    """
    if type(module) is Suppression and not why_not("suppression"):
        from model.gpu.suppression import ListSuppression

        return ListSuppression(module.max_iou)
    kinds = (ResNetMaps, nn.Sequential, nn.Conv2d, ConvReLU, Merge)
    if type(module) in kinds and not why_not("convolution"):
        return _fast_convolution(module)
    return None


def _fast_convolution(module: nn.Module) -> nn.Module | None:
    from model.gpu import backbone, convolution

    if type(module) is ResNetMaps and backbone.is_folded(module):
        return backbone.FoldedResNetMaps(module)
    if backbone.is_folded_stage(module):
        return backbone.Stage(*module.children())
    if type(module) is nn.Conv2d:
        return convolution.Convolution(module)
    if type(module) is ConvReLU:
        return convolution.ConvReLU()
    if type(module) is Merge:
        return convolution.Merge()
    return None
