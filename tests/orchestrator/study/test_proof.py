"""Proofs: what the service knows of a trial, so that another owner may take its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.proof import PROOF_TAG, with_proofs
from tests.orchestrator.studies import write_dataset
from tests.orchestrator.submissions import plan, submission


@pytest.mark.parametrize(
    ("model", "proven"),
    [
        ({}, True),
        ({"weights": {"kind": "torchvision", "name": "IMAGENET1K_V1"}}, True),
        ({"weights": {"kind": "file", "path": "/shared/w.pth"}}, False),
        ({"proposals": {"kind": "fixed", "uri": "s3://data/proposals.arrow"}}, False),
    ],
)
def test_a_run_from_a_file_that_somebody_may_replace_has_no_proof(
    tmp_path: Path, model: dict[str, Any], proven: bool
) -> None:
    data = {split: str(write_dataset(tmp_path) / split) for split in ("train", "val")}
    run = {"seed": 0, "data": data, "model": model}
    sent = with_proofs(submission(plan().model_copy(update={"run": run}), code="c" * 64))
    assert (PROOF_TAG in sent.trials[0].tags) == proven
