"""Runs the tests that need a CUDA device on one that computes nothing.

What they say about launches, waits and refusals holds there too.
"""

from __future__ import annotations

import sys

import pytest

from tests.nullgpu import null_cuda

pytestmark = pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not())


@pytest.mark.parametrize(
    "tests",
    [
        ["tests/nullgpu/test_capture.py"],
        ["tests/workers/test_gpu.py", "-k", "never_wait"],
        ["tests/workers/training/test_on_a_gpu.py"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_passes(tests):
    pytest_options = ["-q", "-x", "-p", "tests.nullgpu.plugin", "-p", "no:cacheprovider"]
    done = null_cuda.run([sys.executable, "-m", "pytest", *pytest_options, *tests])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " skipped" not in done.stdout.splitlines()[-1]
