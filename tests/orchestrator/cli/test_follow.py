"""Following a study, and what the command line says to slips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.answers import StudyView
from contract.command import run_app
from contract.run_file import read_run_file
from orchestrator.cli import follow as following
from orchestrator.cli.app import app
from orchestrator.cli.tables import print_studies
from orchestrator.client import Client, Connection
from orchestrator.study.read import read_study
from tests.orchestrator.studies import finished


class Answers(Client):
    """A service whose study is in the given states, one at each look."""

    def __init__(self, *states: str) -> None:
        super().__init__(Connection("http://127.0.0.1:1", "t", Path("/here")))
        self.states = list(states)

    def study(self, study: str) -> StudyView:
        trial = finished({"roi": "align"}, 0, cached_from="other-003", cached_name="other:a/seed-0")
        state = self.states.pop(0)
        fields = {"study": study, "name": "s", "owner": "ann", "priority": 0, "created_at": 0.0}
        return StudyView.model_validate(
            {**fields, "state": state, "storage": "/s", "spec": {}, "trials": [trial]}
        )


def test_a_pause_ends_no_watch_and_is_told(monkeypatch, capsys):
    monkeypatch.setattr(following, "_POLL_S", 0.0)
    client = Answers("active", "paused", "paused", "active", "done")
    assert following.follow(client, "s-1", "live").state == "done"
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ['study s-1: paused; "maskray resume s-1" goes on', "study s-1: active"]
    assert "(taken from trial other:a/seed-0)" in lines[0]
    client = Answers("paused", "cancelled")
    assert following.follow(client, "s-1", "json").state == "cancelled"
    said = capsys.readouterr()
    assert json.loads(said.out)["key"] == "roi=align/seed-0", "stdout holds the records alone"


def test_no_studies_names_the_folder(capsys):
    client = Answers()
    print_studies([], client.where())
    assert "no studies yet in /here" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert run_app(app, ["--version"], "maskray") == 0
    assert capsys.readouterr().out.startswith("maskray 0.")


def test_a_study_for_train_and_a_run_for_run_are_told_so(tmp_path):
    study, run = tmp_path / "study.yaml", tmp_path / "run.yaml"
    study.write_text("name: s\nbaseline: {preset: tiny}\n")
    run.write_text("preset: tiny\nloop: {steps: 3}\n")
    with pytest.raises(ValueError, match=r'is a study, not a run .* "maskray run .*study.yaml"'):
        read_run_file(study)
    with pytest.raises(ValueError, match=r'is a run, not a study .* "maskray train .*run.yaml"'):
        read_study(run)
