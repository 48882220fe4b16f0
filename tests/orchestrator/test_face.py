"""`import maskray`: a study from Python, read as a table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import maskray
from contract.answers import StudyView, Submitted
from contract.study import Submission
from orchestrator.client import Client, Connection
from tests.orchestrator.studies import finished, write_dataset


class Service(Client):
    """A service that takes every study; its trials are in the given states, one at each look."""

    def __init__(self, folder: Path, *states: str) -> None:
        super().__init__(Connection("http://127.0.0.1:1", "t", folder))
        self.folder, self.states = folder, list(states)
        self.sent: list[Submission] = []

    def upload_code(self, sha256: str, data: bytes) -> None:
        assert data

    def submit(self, submission: Submission) -> Submitted:
        self.sent.append(submission)
        return Submitted(study="s-1", created=True, trials=len(submission.trials))

    def study(self, study: str) -> StudyView:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        arms: list[dict[str, str]] = [{"roi": "<align>", "seed": "x"}, {"roi": "pool", "seed": "x"}]
        trials = [
            finished(arm, 0, metrics={"bbox/AP": 0.25}, storage=str(self.folder)) for arm in arms
        ]
        fields = {"study": study, "name": "s", "owner": "ann", "priority": 0, "created_at": 0.0}
        return StudyView.model_validate(
            {**fields, "state": state, "storage": "/s", "spec": {}, "trials": trials}
        )


def test_a_study_is_submitted_from_a_dictionary(tmp_path):
    service = Service(tmp_path, "active", "paused", "done")
    data = write_dataset(tmp_path / "data")
    study = maskray.Session(service).submit(
        {
            "name": "s",
            "baseline": {"preset": "tiny"},
            "factors": {"roi": {"align": {}, "pool": {"model.roi.kind": "pool"}}},
            "seeds": 2,
        },
        data=str(data),
    )
    assert [t.key for t in service.sent[0].trials][:2] == ["roi=align/seed-0", "roi=align/seed-1"]
    assert study.wait(poll_s=0.0).state == "done"
    with pytest.raises(ValueError, match="study: name"):
        maskray.Session(service).submit({"name": "my s", "baseline": {"preset": "tiny"}})


def test_a_frame_has_a_row_a_trial_and_a_column_a_factor(tmp_path):
    frame = maskray.StudyHandle(Service(tmp_path, "done"), "s-1").frame()
    assert list(frame["roi"]) == ["<align>", "pool"]
    assert list(frame["factor.seed"]) == ["x", "x"], "a factor may have the name of a column"
    assert list(frame["seed"]) == [0, 0]
    assert list(frame["bbox/AP"]) == [0.25, 0.25]


def test_a_notebook_shows_one_live_table(tmp_path, monkeypatch):
    shown: list[str] = []

    def display(value: Any, display_id: bool) -> Any:
        assert display_id
        shown.append(value._repr_html_())
        return SimpleNamespace(update=lambda new: shown.append(new._repr_html_()))

    notebook = SimpleNamespace(
        get_ipython=lambda: object(), display=SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    study = maskray.StudyHandle(Service(tmp_path, "active", "done"), "s-1").wait(poll_s=0.0)
    assert len(shown) == 2
    assert "roi=&lt;align&gt;,seed=x/seed-0" in shown[-1], "names are no HTML"
    assert "<td>25.0</td>" in study._repr_html_()


def test_a_wait_has_an_end(tmp_path):
    study = maskray.StudyHandle(Service(tmp_path, "active"), "s-1")
    with pytest.raises(TimeoutError, match="study s-1 is active after"):
        study.wait(timeout_s=1e-9, poll_s=0.0)


def test_a_trial_gives_its_weights(tmp_path):
    study = maskray.StudyHandle(Service(tmp_path, "done"), "s-1")
    trial = study.trial("roi=pool,seed=x/seed-0")
    with pytest.raises(ValueError, match="has no last weights"):
        trial.weights()
    file = tmp_path / "artifacts" / "weights-last.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"w")
    assert trial.weights() == file
    with pytest.raises(ValueError, match="trial 'x': study s-1 has roi="):
        study.trial("x")
