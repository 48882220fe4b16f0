"""Runs the tests that need a CUDA device on one that computes nothing.

What they say about launches, waits and refusals holds there too.
"""

from __future__ import annotations

import sys

import pytest

from tests.nullgpu import null_cuda

pytestmark = pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not())

TESTS = [
    "tests/nullgpu/test_capture.py",
    "tests/nullgpu/test_ddp.py",
    "tests/workers/training/test_on_a_gpu.py",
    "tests/workers/test_gpu.py::test_ten_steps_never_wait_for_the_host",
]


@pytest.mark.slow
def test_what_needs_a_device_passes_on_the_null_cuda():
    # in one process, since its start takes the longest
    options = ["-q", "-p", "tests.nullgpu.plugin", "-p", "no:cacheprovider"]
    done = null_cuda.run([sys.executable, "-m", "pytest", *options, *TESTS])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    last = done.stdout.splitlines()[-1]
    assert "passed" in last
    assert "skipped" not in last
