"""Every study in `studies/mini/` plans, and docs/results.md names the file of its numbers."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from contract.study import Submission
from orchestrator.results.planning.plan import make_plan
from orchestrator.study.expand import expand
from orchestrator.study.read import read_study
from studies.mini.blocks import blocks, correlation, squares
from studies.mini.splits import runs
from tests.orchestrator.studies import CODE, write_manifest

ROOT = Path(__file__).parents[3]
MINIS = sorted(path.stem for path in (ROOT / "studies/mini").glob("*.yaml"))
OUTLINES = ("person", "lamp", "ellipse", "drop", "star", "burst")


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_study_plans_on_the_data_that_it_names(name: str, tmp_path: Path) -> None:
    for kind in ("scenes", "grid"):
        for split in ("train", "test"):
            write_manifest(tmp_path / ".maskray/mini" / kind / split, OUTLINES, keypoints=True)
    (tmp_path / ".maskray/mini/start.safetensors").write_bytes(b"weights")
    study, text = read_study(ROOT / "studies/mini" / f"{name}.yaml")
    trials = expand(study, root=tmp_path, code=CODE).trials
    arms = {tuple(trial.arm.items()) for trial in trials}
    assert study.name == f"mini-{name}"
    assert len(trials) == len(arms) * len(study.every_seed)
    submission = Submission(study=study, study_yaml=text, trials=trials)
    asked = make_plan(submission, {}).foresight.contrasts
    assert [one.asked.name for one in asked] == list(study.contrasts)
    # The pilot's seeds start at 1000.
    assert all(trial.seed < 1000 for trial in trials)


def test_results_are_of_the_study_files_that_they_name() -> None:
    """A change of a study after its first seed would make its verdict one of another study."""
    page = (ROOT / "docs/results.md").read_text()
    named = re.findall(r"`(studies/mini/[\w-]+\.yaml)`[^`]*`([0-9a-f]{64})`", page)
    assert named
    for file, digest in named:
        assert hashlib.sha256((ROOT / file).read_bytes()).hexdigest() == digest, file


def test_the_splits_deal_finished_runs_alone(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = ["arm,seed,state,metric,value", "a,0,done,segm/AP,0.3", "a,1,cancelled,segm/AP,0.1"]
    table.write_text("\n".join(rows))
    assert runs(table, ["segm/AP"]).tolist() == [[0.3]]


def test_the_correlation_of_blocks_is_the_intraclass_one(tmp_path: Path) -> None:
    """Of arms that share most of their noise, and of arms that share none."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=400), rng.normal(size=(3, 400))
    for share in (0.0, 0.8):
        values = np.sqrt(share) * shared + np.sqrt(1 - share) * own + [[1.0], [2.0], [3.0]]
        assert correlation([squares(values)]) == pytest.approx(share, abs=0.05)
    lines = ["arm,seed,state,metric,value"]
    lines += [
        f"{arm},{seed},done,bbox/AP,{values[number, seed]}"
        for number, arm in enumerate("abc")
        for seed in range(4)
    ]
    (tmp_path / "table.csv").write_text("\n".join([*lines, "a,9,done,bbox/AP,1", "b,5,failed,x,"]))
    assert (blocks(tmp_path / "table.csv", "bbox/AP") == values[:, :4]).all()
