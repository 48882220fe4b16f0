"""Submissions for the fake entry: studies whose trials train nothing."""

from __future__ import annotations

import hashlib
from typing import Any

from contract.study import Baseline, Resources, Study, Submission, TrialPlan


def plan(
    key: str = "a=0/seed-0", identity: str = "a" * 64, seed: int = 0, **fake: Any
) -> TrialPlan:
    """One trial; `fake` is what `fake_entry.py` does."""
    return TrialPlan(
        key=key,
        arm={"a": key},
        seed=seed,
        baseline=False,
        identity=identity,
        run={"seed": seed, "fake": fake},
    )


def submission(
    *plans: TrialPlan, name: str = "study", owner: str = "", **fields: Any
) -> Submission:
    study_fields = {key: fields.pop(key) for key in list(fields) if key in Study.model_fields}
    study_fields.setdefault("resources", Resources(ranks=1, cpus_per_rank=1))
    study = Study(name=name, baseline=Baseline(preset="tiny"), **study_fields)
    return Submission(study=study, study_yaml="name: study\n", trials=plans or (plan(),), **fields)


def identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
