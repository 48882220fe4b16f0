"""`pytest -p tests.nullgpu.plugin` in a process on the null CUDA: convolutions are there."""

from __future__ import annotations

from tests.nullgpu import null_cuda

null_cuda.install()
