"""Classes that differ by more than their seeds."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.results.details.slices import classes
from orchestrator.results.report import Contents
from tests.orchestrator.results.paper_study import paper_study, view


def test_only_classes_beyond_their_seeds_are_shown(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    for trial, cat in zip(trials, (0.1, 0.11, 0.09, 0.3, 0.31, 0.29), strict=True):
        result = {"attempt": 1, "per_class": {"segm/AP": {"cat": cat, "dog": 0.2, "void": -1}}}
        (Path(trial.storage) / "result.json").write_text(json.dumps(result))
    contents = Contents.of(view(trials))
    found = classes(contents.facts, contents.comparison)
    assert found.table is not None
    assert [[cell.text for cell in row.cells] for row in found.table.rows] == [
        ["roi RoIAlign", "cat", "+20.0", "+20.0 to +20.0"]
    ]
    assert found.note.startswith("1 of 2 differences by class")
