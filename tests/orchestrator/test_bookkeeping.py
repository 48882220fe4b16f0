"""A study's numbers as the metrics of its parent run."""

from __future__ import annotations

import pytest

from orchestrator.bookkeeping import study_metrics
from orchestrator.config import StudyView
from tests.orchestrator.studies import finished
from tests.orchestrator.submissions import submission


def test_means_differences_and_their_intervals_are_metrics_with_names_that_mlflow_takes() -> None:
    """Two seeds 0.30 and 0.32: t(0.975, 1) = 12.7062 times 0.01 each side of 0.31; the differences are 0.1 and 0.1."""
    base = [finished({"roi": "align"}, seed, True, metrics={"segm/AP": 0.30 + 0.02 * seed}) for seed in (0, 1)]
    pool = [finished({"roi": "pool (2x)"}, seed, metrics={"segm/AP": 0.40 + 0.02 * seed}) for seed in (0, 1)]
    spec = submission().study.model_dump()
    view = StudyView(
        study="s", name="s", owner="o", state="done", priority=0, created_at=0, storage="", spec=spec,
        trials=[*base, *pool],
    )  # fmt: skip
    found = study_metrics(view)
    assert found["roi-align/segm/AP/mean"] == pytest.approx(0.31)
    assert found["roi-align/segm/AP/high"] == pytest.approx(0.31 + 0.127062, rel=1e-5)
    assert found["roi-pool _2x_/segm/AP/difference"] == pytest.approx(0.1)
    assert not [name for name in found if name.startswith("roi-align") and "difference" in name]


def test_one_seed_has_no_interval() -> None:
    view = StudyView(
        study="s", name="s", owner="o", state="done", priority=0, created_at=0, storage="",
        spec=submission().study.model_dump(), trials=[finished({}, 0, True, metrics={"segm/AP": 0.3})],
    )  # fmt: skip
    assert study_metrics(view) == {"baseline/segm/AP/mean": 0.3}
