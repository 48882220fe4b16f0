"""What a training step asks of a GPU, on the null CUDA: no more than budgets.yaml allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu.work import VARIANTS
from contract.presets import PRESETS
from tests.nullgpu import null_cuda

pytestmark = pytest.mark.skipif(bool(null_cuda.why_not()), reason=null_cuda.why_not())

BUDGETS = yaml.safe_load(Path(__file__).with_name("budgets.yaml").read_text())
SMALL, LARGE = BUDGETS["small"], BUDGETS["large"]
ALL = (*PRESETS, *VARIANTS)
QUICK = ("tiny", "r50-c4", "r50-fpn-keypoint")


def plans(names: tuple[str, ...], work: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The JSON of `gpu_plan.py` by preset, from one process: its start takes the longest."""
    options = [word for name, value in work.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/gpu_plan.py", "--json", "--preset", ",".join(names)]
    done = null_cuda.run([*command, *options], timeout_s=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def quick_plans():
    return plans(QUICK, SMALL["work"])


@pytest.fixture(scope="module")
def slow_plans():
    return plans(tuple(name for name in ALL if name not in QUICK), SMALL["work"])


def test_every_preset_has_a_budget():
    assert set(SMALL["presets"]) == set(ALL)


@pytest.mark.parametrize("name", QUICK)
def test_a_step_stays_within_its_budget(quick_plans, name):
    check(quick_plans[name], SMALL["presets"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in QUICK])
def test_a_step_of_the_other_presets_stays_within_its_budget(slow_plans, name):
    check(slow_plans[name], SMALL["presets"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE["presets"])
def test_a_step_at_full_size_stays_within_its_budget(name):
    check(plans((name,), LARGE["work"])[name], LARGE["presets"][name])


def check(plan: Mapping[str, float], budget: Mapping[str, float]) -> None:
    assert {"launches", "waits", "pageable_copies", "gb", "peak_gib"} <= set(budget)
    over = {name: (plan[name], most) for name, most in budget.items() if plan[name] > most}
    assert not over, f"found and allowed: {over}"
