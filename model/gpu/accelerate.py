"""Our kernels for a detector on a GPU. Outside `model.gpu` nothing knows of Triton."""

from __future__ import annotations

from torch import nn

from model.detector import Detector
from model.gpu.usable import kernels, why_not
from model.matching import MatchedSampling
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
    if type(module) is MatchedSampling and not why_not("matching"):
        from model.gpu import matching

        return matching.MatchedSampling(module.rule)
    return None
