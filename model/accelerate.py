"""Our kernels for a detector, by the device that it is on."""

from __future__ import annotations

import torch

import model.cpu.accelerate
import model.gpu.accelerate
import model.gpu.usable
from model.detector import Detector


def accelerate(detector: Detector) -> str:
    """Puts our kernels in place of torch's modules; call it once the detector is on its device.

    Parameters and buffers stay the same objects under the same names, so that optimisers,
    checkpoints and averages see no change. Returns `kernels` of the device.
    """
    if next(detector.parameters()).device.type == "cuda":
        return model.gpu.accelerate.accelerate(detector)
    return model.cpu.accelerate.accelerate(detector)


def kernels(device: torch.device) -> str:
    """What computes for an accelerated detector: "torch", "compiled ..." or "triton ..."."""
    if device.type == "cuda":
        return model.gpu.usable.kernels()
    return model.cpu.accelerate.kernels(device)


def complaints(device: torch.device) -> list[str]:
    """One line for each kernel that this device should run and does not."""
    return model.gpu.usable.complaints() if device.type == "cuda" else []
