"""Our kernels for a detector on a GPU. Outside `model.gpu` nothing knows of Triton."""

from __future__ import annotations

from torch import nn

from model.backbone.layouts import Merge
from model.backbone.networks import ConvReLU, ResNetMaps
from model.branches import keypoint
from model.branches.box import FCTrunk
from model.branches.mask import FCNHead
from model.detector import Detector
from model.gpu import doubling
from model.gpu.usable import kernels, why_not
from model.matching import MatchedSampling
from model.roi.crops import SeparateCrops
from model.roi.operations import RoIOperation
from model.rpn.network import Neighbourhoods
from model.rpn.nms import Suppression


def accelerate(detector: Detector) -> str:
    """Puts the kernels in place of torch's modules, where they work here.

    Parameters and buffers stay the same objects under the same names. Returns `kernels`.
    """
    swap(detector)
    _lay_out(detector)
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
    if type(module) is MatchedSampling and not why_not("matching"):
        from model.gpu import matching

        return matching.MatchedSampling(module.rule)
    if type(module) is RoIOperation and not why_not("roi_align"):
        from model.gpu.roi_align import by_kernels

        return by_kernels(module)
    if type(module) is Neighbourhoods and not why_not("neighbourhoods"):
        from model.gpu import neighbourhoods

        return neighbourhoods.Neighbourhoods()
    if type(module) is keypoint.Doubling:
        return doubling.Doubling()
    kinds = (ResNetMaps, nn.Sequential, nn.Conv2d, ConvReLU, Merge)
    if type(module) is FCNHead and not (why_not("convolution") or why_not("mask")):
        from model.gpu import mask

        head = mask.FCNHead(module)
        swap(head)
        return head
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


def _lay_out(detector: Detector) -> None:
    """The box head's crops as its first linear layer reads them, where it has one."""
    if why_not("roi_align"):
        return
    from model.gpu.roi_align import LevelAlign

    if isinstance(detector.crops, SeparateCrops) and isinstance(detector.box.trunk, FCTrunk):
        box = detector.crops.box
        if isinstance(box, LevelAlign):
            box.channels_last = False
