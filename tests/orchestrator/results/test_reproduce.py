"""Whether two runs agree, and what is submitted to find out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from contract.answers import StudyView, TrialView
from orchestrator.results.reproduce import TAG, agreement, reproduction
from tests.orchestrator.submissions import identity, plan, submission


def done(
    trial: str, seed: int = 0, folder: Path | None = None, arm: str = "a", **metrics: float
) -> TrialView:
    names = {f"{name}/AP": value for name, value in metrics.items()}
    fields: dict[str, Any] = {
        "arm": {"roi": arm},
        "seed": seed,
        "baseline": False,
        "attempts": 1,
        "state": "done",
    }
    return TrialView(
        trial=trial,
        key=trial,
        study="s",
        metrics=names,
        storage=str(folder or "/nowhere"),
        **fields,
    )


def study(*trials: TrialView, gpus: float = 0) -> StudyView:
    spec = submission(resources={"gpus_per_rank": gpus}).study.model_dump()
    return StudyView(
        study="s",
        name="s",
        owner="o",
        state="done",
        priority=0,
        created_at=0,
        storage="",
        spec=spec,
        trials=[*trials],
    )


def test_on_the_cpu_the_last_bit_counts() -> None:
    before, after = done("t", segm=0.25, box=0.3), done("u", segm=0.25, box=math.nextafter(0.3, 1))
    assert agreement(before, before, study(before)).agrees
    result = agreement(before, after, study(before))
    assert result.agrees is False
    assert [pair.agrees for pair in result.pairs] == [False, True]


def test_on_the_cpu_the_last_weights_count_where_they_can_be_read(tmp_path: Path) -> None:
    for name, weights in (("t", "1" * 64), ("u", "2" * 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"weights_sha256": weights}))
    before, after = (
        done("t", folder=tmp_path / "t", segm=0.25),
        done("u", folder=tmp_path / "u", segm=0.25),
    )
    result = agreement(before, after, study(before))
    assert (result.same_weights, result.agrees) == (False, False)
    assert agreement(before, before, study(before)).same_weights
    assert agreement(before, done("u", segm=0.25), study(before)).same_weights is None


def test_on_a_gpu_the_spread_of_the_seeds_of_the_arm_is_the_measure() -> None:
    """Two seeds 1 apart: deviation sqrt(1/2), times sqrt(2), times t(0.975, 1) = 12.7062."""
    arm = [done("t", 0, segm=0.30), done("t1", 1, segm=0.31)]
    other = [done("o", 0, arm="b", segm=0.9), done("o1", 1, arm="b", segm=0.1)]
    view = study(*arm, *other, gpus=1)
    (pair,) = agreement(arm[0], done("u", segm=0.31), view).pairs
    assert pair.allowed == pytest.approx(0.127062, rel=1e-5)
    assert agreement(arm[0], done("u", segm=0.42), view).agrees
    assert agreement(arm[0], done("u", segm=0.43), view).agrees is False


def test_on_a_gpu_one_seed_says_nothing_about_a_difference() -> None:
    before = done("t", segm=0.30)
    assert agreement(before, done("u", segm=0.31), study(before, gpus=1)).agrees is None
    assert agreement(before, before, study(before, gpus=1)).agrees


def test_a_metric_that_is_missing_does_not_agree() -> None:
    before = done("t", segm=0.30, box=0.2)
    assert agreement(before, done("u", segm=0.30), study(before)).agrees is False
    assert agreement(done("t"), done("u"), study(before)).agrees is None


def test_a_reproduction_is_the_same_run_marked_and_never_taken_from_the_ledger() -> None:
    original = submission(
        plan("a", identity("a"), seed=3), plan("b", identity("b")), code="c" * 64, max_parallel=1
    )
    resubmitted = reproduction(done("t").model_copy(update={"key": "a"}), original, fresh=False)
    (again,) = resubmitted.trials
    assert (again.run, again.identity, again.tags) == (
        original.trials[0].run,
        identity("a"),
        {TAG: "t"},
    )
    assert (resubmitted.code, resubmitted.fresh, resubmitted.study.name) == (
        original.code,
        True,
        "again-study",
    )
    assert resubmitted.study.resources == original.study.resources
    assert (
        resubmitted.idempotency_key
        == reproduction(done("t").model_copy(update={"key": "a"}), original, False).idempotency_key
    )
    fresh = reproduction(done("t").model_copy(update={"key": "a"}), original, fresh=True)
    assert fresh.idempotency_key != resubmitted.idempotency_key


def test_only_a_finished_trial_is_reproduced() -> None:
    failed = done("t").model_copy(update={"state": "failed"})
    with pytest.raises(ValueError, match="trial t is failed"):
        reproduction(failed, submission(), fresh=False)
