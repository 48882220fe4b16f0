"""`make gpu-check` on the null CUDA: every section runs, fails alone, and needs few packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.nullgpu import null_cuda

pytestmark = pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not())

# A GPU machine may have torch and little else.
PROGRAM = """
import sys
for name in ("ray", "mlflow", "pyarrow", "sqlalchemy", "fastapi", "matplotlib", "typer"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from tests.nullgpu import null_cuda
null_cuda.install()
from benchmarks.gpu_check import main
sys.exit(main())
"""


def check(path, *options):
    command = [sys.executable, "-c", PROGRAM, "--dry", "--json", str(path), *options]
    done = null_cuda.run(command, timeout_s=600)
    return done, json.loads(path.read_text()) if path.exists() else {}


def test_a_short_check_reports_each_probe(tmp_path):
    done, report = check(tmp_path / "gpu.json", "--only", "environment,copies,suppression")
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["environment"]["machine"]["gpu"] == "null H100"
    assert report["copies"]["host to device"]["bytes"] > 0
    assert report["failed"] == {}


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    done, report = check(tmp_path / "gpu.json")
    # encoding masks needs pyarrow, which PROGRAM hides: it fails alone
    assert list(report["failed"]) == ["prediction pasting and encoding on the host"], done.stderr
    assert done.returncode == 1
    for section in ("agreement", "waits", "throughput", "kernels", "roi_align", "graphs"):
        assert report[section], section
    assert set(report["waits"].values()) == {"none"}


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "benchmarks/gpu_check.py", "--json", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
