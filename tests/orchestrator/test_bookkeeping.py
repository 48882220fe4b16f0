"""What MLflow is told of studies and trials that are over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from orchestrator import accept, ledger
from orchestrator.bookkeeping import close_runs, study_metrics
from orchestrator.config import ServiceSettings, StudyView
from orchestrator.tables import STUDIES, TRIALS
from tests.orchestrator.studies import finished
from tests.orchestrator.submissions import plan, submission
from workers.config import SPOOL_CURSOR, SPOOL_RECORDS
from workers.spool import Spool


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


class FakeMLflow:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def experiment(self, name: str, tags: Any) -> str:
        return name

    def runs(self, experiment: str, condition: str) -> list[dict[str, Any]]:
        return [{"info": {"run_id": "r", "status": "RUNNING"}, "data": {}}]

    def set_tag(self, run: str, key: str, value: str) -> None:
        pass

    def end_run(self, run: str, status: str, at: float) -> None:
        self.ended.append(status)


def test_what_a_trial_could_not_send_is_sent_before_its_run_is_closed(tmp_path: Path) -> None:
    engine = ledger.open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    study, _ = accept.accept(engine, settings, submission(plan("a"), plan("b", "b" * 64)), "ann", 1.0)
    with engine.begin() as connection:
        connection.execute(update(TRIALS).values(state="done"))
        connection.execute(update(STUDIES).values(mlflow_experiment=study))
    left, sent = (tmp_path / "studies" / study / f"{study}-00{i}" for i in range(2))
    for folder in (left, sent):
        spool = Spool(folder / "spool")
        spool.append({"kind": "tags", "values": {}})
        spool.close()
        assert (folder / SPOOL_RECORDS).stat().st_size > 0
    (sent / SPOOL_CURSOR).write_text(json.dumps({"bytes": (sent / SPOOL_RECORDS).stat().st_size}))
    mlflow, shipped = FakeMLflow(), list[str]()
    for _ in range(2):
        close_runs(engine, mlflow, 2.0, shipped.append)  # type: ignore[arg-type]
    assert shipped == [str(left)]
    assert mlflow.ended == ["FINISHED", "FINISHED"]
    engine.dispose()
