"""Initial parameters as a pure function of (seed, parameter name, shape)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

# Predictors that start near zero (Fast R-CNN): names of modules and standard deviations.
_PREDICTOR_STD = {
    "rpn.conv": 0.01,
    "rpn.objectness": 0.01,
    "rpn.offsets": 0.01,
    "box.class_logits": 0.01,
    "box.offsets": 0.001,
    "mask.head.logits": 0.001,
}


def initialise(network: nn.Module, seed: int) -> None:
    """Draws every weight in place.

    Predictors have the deviations above. Linear layers and FPN follow Xavier's uniform rule
    (detectron2's c2_xavier), other convolutions He's normal rule over the outputs. Biases are 0,
    norms stay the identity.
    """
    with torch.no_grad():
        for module_name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.copy_(_weight(module_name, module, seed))
                if module.bias is not None:
                    module.bias.zero_()


def _weight(name: str, module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, seed: int) -> Tensor:
    # A generator for each weight: what one module draws does not move the draws of the next, so
    # arms stay paired.
    generator = torch.Generator().manual_seed(_key(seed, f"{name}.weight"))
    weight = torch.empty(module.weight.shape)
    if name in _PREDICTOR_STD:
        return nn.init.normal_(weight, std=_PREDICTOR_STD[name], generator=generator)
    if isinstance(module, nn.Linear) or name.startswith("layout."):
        return nn.init.kaiming_uniform_(weight, a=1, generator=generator)
    return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


def _key(seed: int, name: str) -> int:
    # 7 bytes: a seed of torch is a signed 64-bit number.
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
