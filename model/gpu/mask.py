"""The end of the mask head on a GPU: the deconvolution and each RoI's own channel in one pass.

The hidden maps are the largest of the head, four times its input. torch writes their gradient,
copies it to channels-last and masks it; here one pass over them has all gradients.

Axes: R RoIs, C channels, M mask side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.branches import mask
from model.gpu import epilogue
from model.gpu.convolution import (
    are_close,
    autocast_type,
    entered,
    fits,
    run,
    run_back,
    trial_numbers,
)


def trial() -> bool:
    """Whether the kernels compute what torch does, forward and backward."""
    shapes = ((2, 3, 3, 5), (3, 4, 2, 2), (4,), (2, 4))
    x, *parameters, weight_RC = (trial_numbers(shape) for shape in shapes)
    # On the meta device a layer draws no random number.
    deconv = nn.ConvTranspose2d(3, 4, 2, stride=2, device="meta")
    deconv.weight, deconv.bias = map(nn.Parameter, parameters)
    inputs = [x, weight_RC, *deconv.parameters()]
    ours = _Own.apply(deconv, x, deconv.weight, deconv.bias, weight_RC)
    theirs = mask.own_channel_product(deconv(x).relu(), weight_RC)
    pairs = [(ours, theirs)]
    grads = (torch.autograd.grad(own.square().sum(), inputs) for own in (ours, theirs))
    return all(are_close(a, b, 1e-2) for a, b in [*pairs, *zip(*grads, strict=True)])


class FCNHead(mask.FCNHead):
    """The head by our kernels."""

    def __init__(self, head: mask.FCNHead) -> None:
        """Shares the modules of `head`."""
        nn.Module.__init__(self)
        for name, child in head.named_children():
            self.add_module(name, child)

    def own(self, features: Tensor, channel_R: Tensor) -> Tensor:
        """As `mask.FCNHead.own`."""
        if not fits(self.deconv, features):
            return super().own(features, channel_R)
        x = features
        for conv in self.convs:
            x = self.conv_relu(conv, x)
        x = x.to(autocast_type(x) or x.dtype)
        weight, bias = self.logits.weight.flatten(1)[channel_R], self.logits.bias
        own: Tensor = _Own.apply(self.deconv, x, self.deconv.weight, self.deconv.bias, weight)
        assert bias is not None
        return own + bias[channel_R][:, None, None]


class _Own(torch.autograd.Function):
    """own_channel_product(relu(deconv(x)), weight)."""

    @staticmethod
    def forward(
        ctx: Any,
        deconv: nn.ConvTranspose2d,
        x: Tensor,
        deconv_weight: Tensor,  # noqa: ARG004 - autograd wants to see the parameters of `deconv`
        bias: Tensor | None,
        weight_RC: Tensor,
    ) -> Tensor:
        weight, _ = entered(deconv, x.dtype)
        y = run(deconv, x, weight)
        own = epilogue.finish_own(y, bias, weight_RC)
        ctx.deconv = deconv
        ctx.save_for_backward(x, weight, y, weight_RC)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RMM: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, weight_RC = ctx.saved_tensors
        _, of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        gradient, to_own, to_bias = epilogue.own_gradients(gradient_RMM, y, weight_RC)
        to_x, to_weight = run_back(ctx.deconv, gradient, x, weight, of_x, of_weight)
        return None, to_x, to_weight, to_bias if of_bias else None, to_own
