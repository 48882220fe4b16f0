"""The GPU's convolutions: interpreted on the CPU, and compiled for GPUs not at hand."""

from __future__ import annotations

import pytest

from tests.model.gpu.without_a_gpu import check

triton = pytest.importorskip("triton", reason="torch came without Triton")

INTERPRETED = """
import tests.model.gpu.convolutions as cases
for name, case in sorted(vars(cases).items()):
    if name.startswith("check_"):
        case()
"""
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from model.gpu import epilogue
sides = dict.fromkeys(("height", "width", "low", "narrow", "rows", "columns"), "i32")
weights = {f"{w}_{axis}": "i32" for w in ("source", "result") for axis in ("out", "in", "cell")}
norm = dict.fromkeys(("norm_weight", "norm_bias", "mean", "variance", "shift"), "*fp32")
tile = {"ROWS": 4, "BLOCK": 64}
kernels = (
    (epilogue._weight, {"source": "*fp32", "result": "*bf16", **norm, **weights, "numbers": "i32",
        "inside": "i32", "cells": "i32", "eps": "fp32"},
        {"NORM": True, "SHIFT": True, "TILE": 512}),
    (epilogue._finish, {"out": "*bf16", "other": "*bf16", "first": "*fp32", "second": "*fp32",
        "channels": "i32", **sides, "of_height": "fp32", "of_width": "fp32"},
        {"FIRST": True, "SECOND": True, "OTHER": True, "RESIZED": True, "RELU": True, **tile}),
    (epilogue._pool_relu, {"maps": "*bf16", "bias": "*fp32", "result": "*bf16", "num_rows": "i32",
        "channels": "i32", **sides}, tile),
    (epilogue._masked_sum, {**dict.fromkeys(("first", "second", "third", "y", "result"), "*bf16"),
        "partial": "*fp32", "rows": "i32", "channels": "i32"},
        {"GRADIENTS": 3, "RELU": True, "BIAS": True, "TILES": 8, **tile}),
    (epilogue._halved_sum, {**dict.fromkeys(("gradient", "result"), "*bf16"), "partial": "*fp32",
        "rows": "i32", "channels": "i32", "width": "i32"}, {"BIAS": True, "TILES": 8, **tile}),
    (epilogue._finish_own, {"out": "*bf16", "bias": "*fp32", "weight": "*fp32", "result": "*bf16",
        "cells": "i32", "channels": "i32"}, {"BIAS": True, "CELLS": 4, "BLOCK": 64}),
    (epilogue._own_gradients, {"gradient": "*bf16", "y": "*bf16", "weight": "*fp32",
        "to_out": "*bf16", "to_weight": "*fp32", "partial": "*fp32", "cells": "i32",
        "channels": "i32"}, {"CELLS": 4, "BLOCK": 64}),
)
for kernel, signature, constants in kernels:
    signatures = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    for capability in (80, 90):
        source = ASTSource(kernel, signatures, constants)
        built = compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"]
"""


def test_the_kernels_interpreted(tmp_path):
    check(INTERPRETED, tmp_path, interpret=True)


@pytest.mark.slow
def test_the_kernels_compile(tmp_path):
    check(COMPILED, tmp_path, interpret=False)
