"""Convolutions on a GPU with what follows them: bias or frozen norm, sum and ReLU in one pass.

torch runs a kernel for each, and the weights are folded, cast and copied to channels-last by
kernels of their own. The numbers are torch's but for rounding: sums are float32 until the result is
stored. Only torch has gradients of gradients: a second backward pass raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.backbone import layouts, networks
from model.backbone.networks import FoldedConv2d, geometry
from model.gpu import epilogue

Layer: TypeAlias = nn.Conv2d | nn.ConvTranspose2d
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def trial() -> bool:
    """Whether the kernels compute what torch does, forward and backward."""
    shapes = ((2, 3, 6, 5), (2, 4, 3, 2), (4, 3, 3, 3), (4,), (4, 3, 3, 3))
    x, above, *parameters = (trial_numbers(shape) for shape in shapes)
    # On the meta device a layer draws no random number.
    conv = nn.Conv2d(3, 4, 3, padding=1, device="meta")
    folded = FoldedConv2d(conv, 1e-5)
    conv.weight, conv.bias, folded.weight = map(nn.Parameter, parameters)
    folded.cuda()
    for number, buffer in enumerate(folded.buffers()):
        buffer.fill_(0.5 + number / 3)
    inputs = [x, above, *conv.parameters(), *folded.parameters()]

    def results(ours: bool) -> list[Tensor]:
        if ours:
            (level,) = convolved([(conv, x)], above, relu=False)
            (y,) = convolved([(conv, x), (folded, x)])
            pooled = epilogue.pool_relu(*before_shift(folded, x))
        else:
            level, y = layouts.Merge()(conv, x, above), F.relu(conv(x) + folded(x))
            pooled = F.relu(F.max_pool2d(folded(x), 3, 2, 1))
        loss = level.float().square().sum() + y.float().square().sum()
        return [level, y, pooled, *torch.autograd.grad(loss, inputs)]

    native = torch.cuda.is_bf16_supported(including_emulation=False)
    close = True
    for enabled in (False, native):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            pairs = zip(results(ours=True), results(ours=False), strict=True)
            close &= all(are_close(a, b, 3e-2 if enabled else 1e-2) for a, b in pairs)
    return close


def trial_numbers(shape: tuple[int, ...]) -> Tensor:
    """Numbers of both signs on the GPU, with gradients."""
    numbers = torch.linspace(-9, 8, math.prod(shape), device="cuda")
    return numbers.sin().reshape(shape).requires_grad_()


def are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether they differ by that part of b at most, as vectors."""
    return ((a.float() - b.float()).norm() <= tolerance * b.float().norm()).item() is True


def fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether `convolved` computes what the layer would.

    Inductor fuses the same by itself, and evaluation without autocast keeps frozen norms apart.
    """
    if torch.compiler.is_compiling() or x.dim() != 4 or x.dtype not in _TYPES:
        return False
    if isinstance(layer, FoldedConv2d) and not (layer.training or autocast_type(x)):
        return False
    return (
        isinstance(layer, Layer)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None outside it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def convolved(
    terms: Sequence[tuple[Layer, Tensor]],
    other: Tensor | None = None,
    relu: bool = True,
    copies: int = 1,
) -> tuple[Tensor, ...]:
    """relu(sum of layer(x) + other), `copies` times the same tensor. At most two terms.

    other: of any height and width; the nearest cell is read. Readers of different copies have their
    gradients added in the pass that masks them; up to three.
    """
    inputs: list[Tensor | None] = []
    for layer, x in terms:
        x = x.to(autocast_type(x) or x.dtype)
        inputs += [x, layer.weight, layer.bias]
    layers = tuple(layer for layer, _ in terms)
    return cast(
        tuple[Tensor, ...], _Convolved.apply(layers, relu, copies, _like(other, inputs[0]), *inputs)
    )


def _like(other: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if other is None or x is None else other.to(x.dtype)


def before_shift(layer: FoldedConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer without its shift, which comes second; without gradients."""
    with torch.no_grad():
        x = x.to(autocast_type(x) or x.dtype)
        weight, shift = entered(layer, x.dtype)
        assert shift is not None
        return run(layer, x, weight), shift


def entered(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return epilogue.enter_weight(layer.weight, _norm(layer), dtype)


def _norm(layer: Layer) -> FoldedConv2d | None:
    return layer if isinstance(layer, FoldedConv2d) else None


def run(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    return epilogue.channels_last(
        torch.ops.aten.convolution(
            *(x, weight, None, layer.stride, layer.padding, layer.dilation),
            *(layer.transposed, layer.output_padding, layer.groups),
        )
    )


def _summed(
    terms: Sequence[tuple[Layer, Tensor, Tensor]],
    biases: Sequence[Tensor],
    other: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(sum of the convolutions + biases + other). terms: layer, input and weight."""
    out, *rest = [run(*term) for term in terms]
    assert len(rest) + (other is not None) <= 1
    return epilogue.finish(out, biases, rest[0] if rest else other, relu)


class _Convolved(torch.autograd.Function):
    """See `convolved`. Arguments: x, weight and bias of each term."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: tuple[Layer, ...],
        relu: bool,
        copies: int,
        other: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        xs = [cast(Tensor, x) for x in inputs[::3]]
        weights, biases = [], []
        for layer, x in zip(layers, xs, strict=True):
            weight, shift = entered(layer, x.dtype)
            weights.append(weight)
            bias = layer.bias if shift is None else shift
            biases += [] if bias is None else [bias]
        y = _summed(list(zip(layers, xs, weights, strict=True)), biases, other, relu)
        ctx.layers, ctx.relu = layers, relu
        ctx.other_size = None if other is None else other.shape
        ctx.save_for_backward(*xs, *weights, *([y] if relu else []))
        return tuple(y if n == 0 else y.view_as(y) for n in range(copies))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given, terms = [g for g in gradients if g is not None], len(ctx.layers)
        needs = ctx.needs_input_grad
        if not given:
            return (None,) * len(needs)
        saved = ctx.saved_tensors
        y = saved[-1] if ctx.relu else None
        with_bias = any(needs[6::3])
        result: list[Tensor | None] = [None, None, None, None]
        if needs[3] and y is None and len(given) == 1 and _is_half(ctx.other_size, given[0]):
            gradient = epilogue.channels_last(given[0])
            result[3], of_bias = epilogue.halved_sum(gradient, with_bias)
        else:
            gradient, of_bias = epilogue.masked_sum(given, y, with_bias)
            result[3] = _of_other(gradient, ctx.other_size) if needs[3] else None
        for n, layer in enumerate(ctx.layers):
            of_x, of_weight, bias_needs = needs[4 + 3 * n : 7 + 3 * n]
            result += run_back(layer, gradient, saved[n], saved[terms + n], of_x, of_weight)
            result.append(of_bias if bias_needs else None)
        return tuple(result)


def run_back(
    layer: Layer, gradient: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the layer's own weight. weight: as entered."""
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        *(gradient, x, weight, None, layer.stride, layer.padding, layer.dilation),
        *(layer.transposed, layer.output_padding, layer.groups, (of_x, of_weight, False)),
    )
    if of_weight:
        to_weight = epilogue.channels_last(to_weight)
        to_weight = epilogue.leave_weight(to_weight, layer.weight, _norm(layer))
    return to_x, to_weight


def _is_half(shape: torch.Size, gradient: Tensor) -> bool:
    return all(2 * low == high for low, high in zip(shape[2:], gradient.shape[2:], strict=True))


def _of_other(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of `other`, whose nearest cells were read."""
    if gradient.shape[2:] == shape[2:]:
        return gradient
    result: Tensor = torch.ops.aten.upsample_nearest2d_backward(gradient, gradient.shape[2:], shape)
    return result


class ConvReLU(networks.ConvReLU):
    """The part by our kernels."""

    def forward(self, conv: nn.Module, x: Tensor) -> Tensor:
        """relu(conv(x))."""
        if not fits(conv, x):
            return super().forward(conv, x)
        return convolved([(cast(Layer, conv), x)])[0]


class Merge(layouts.Merge):
    """The level above is read in the pass that adds the bias."""

    def forward(self, lateral: nn.Module, x: Tensor, above: Tensor | None) -> Tensor:
        """lateral(x), plus the level above it where there is one."""
        if not fits(lateral, x):
            return super().forward(lateral, x, above)
        return convolved([(cast(Layer, lateral), x)], above, relu=False)[0]


class Convolution(nn.Conv2d):
    """A convolution whose weights are cast and laid out in one kernel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Shares the parameters of `conv`."""
        # On the meta device a layer draws no random number and takes no memory.
        super().__init__(**geometry(conv), bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, input: Tensor) -> Tensor:
        """As the layer."""
        if not fits(self, input):
            return super().forward(input)
        return convolved([(self, input)], relu=False)[0]
