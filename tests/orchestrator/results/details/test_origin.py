"""What a study cost, and the command that makes it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.answers import AttemptView
from orchestrator.results.details.origin import cost_table, provenance
from orchestrator.results.report import Contents
from tests.orchestrator.results.paper_study import PAPER, POOL, paper_study, paper_trial, view


def test_what_a_study_cost_and_where_it_comes_from_stand_on_the_page(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    attempt = AttemptView(
        number=1, state="done", submission_id="s", started_at=3600.0, ended_at=5400.0
    )
    trials[3] = trials[3].model_copy(update={"attempts": 2, "attempt_list": [attempt, attempt]})
    contents = Contents.of(view(trials, resources={"ranks": 2, "gpus_per_rank": 1}, **PAPER))
    rows = [
        [cell.text for cell in row.cells]
        for row in cost_table(contents.facts, contents.comparison).rows
    ]
    assert rows == [["roi RoIPool", "0.00", "-", "0", "0"], ["roi RoIAlign", "2.00", "-", "1", "0"]]
    known = dict(provenance(contents.view, contents.facts))
    assert known["last trial ended"] == "1970-01-01 01:30 UTC"
    assert known["one trial again, compared"] == "maskray reproduce s-1:KEY"
    assert known["the same study again"] == "maskray run test.yaml --fresh"


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [("d/train", "d/val", " --data d"), ("d/train", "d/test", ""), ("d/train", "e/val", "")],
)
def test_the_command_names_the_data_only_where_it_leads_to_the_same(
    tmp_path: Path, train: str, val: str, said: str
) -> None:
    trials = [paper_trial(tmp_path, POOL, 0, 0.3, **{"data.train": train, "data.val": val})]
    said = said.replace("--data ", f"--data {tmp_path}/")  # a preset's paths begin in its folder
    contents = Contents.of(view(trials))
    known = dict(provenance(contents.view, contents.facts))
    assert known["the same study again"] == f"maskray run test.yaml{said} --fresh"
