"""A trained run's proposals, written once and trained on by another run."""

from __future__ import annotations

import json

from pipelines.load.proposals import ProposalTable
from tests.workers.trials import go, run_of, spec_of
from workers.propose import main


def test_a_run_trains_and_is_scored_on_the_proposals_of_another(tmp_path, packed, capsys):
    assert go(spec_of(tmp_path / "rpn", run_of(packed, loop__steps=2))).state == "done"
    out = str(tmp_path / "proposals.arrow")
    capsys.readouterr()
    assert main([str(tmp_path / "rpn"), "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "images": 20}
    assert ProposalTable(out).most > 0
    fixed = run_of(packed, loop__steps=2, model__proposals__kind="fixed", model__proposals__uri=out)
    outcome = go(spec_of(tmp_path / "fixed", fixed))
    assert outcome.state == "done", outcome.error


def test_an_unfinished_run_and_one_without_an_rpn_are_refused(tmp_path, packed, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "p.arrow")]) == 2
    assert "no run there" in capsys.readouterr().err
