"""What the commands show a person, and what they do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from contract.answers import (
    Forgotten,
    Info,
    LogPage,
    NewToken,
    QueueEntry,
    QueueView,
    StudyView,
    UserView,
)
from orchestrator.cli import service, show
from orchestrator.cli.app import app
from orchestrator.cli.tables import print_queue

SETTINGS = """
home: /srv/maskray
ledger: postgresql+psycopg://maskray:p@ss-of-ledger@db/maskray
webhook: https://chat.example.org/hook/secret-of-hook
environment: {AWS_SECRET_ACCESS_KEY: secret-of-s3}
"""


class FakeClient:
    """A service with one user."""

    def __init__(self, role: str = "read", user: str = "eve") -> None:
        self.role, self.user = role, user
        self.made: list[str] = []
        self.asked = 0

    def info(self) -> Info:
        self.asked += 1
        fields: dict[str, Any] = {"version": "1", "mlflow_uri": "", "has_mlflow": False}
        cluster = {"state": "ready", "nodes": []}
        return Info(**fields, storage="", cluster=cluster, user=self.user, role=self.role)

    def users(self) -> list[UserView]:
        return [UserView(name="bob", role="admin", created_at=0.0)]

    def set_user(self, name: str, role: str) -> NewToken:
        self.made.append(name)
        return NewToken(user=name, role=role, token="t" * 20)

    def logs(self, trial: str, offset: int = 0, **_: Any) -> LogPage:
        text = "" if offset else "\x1b]0;title\x07red \x1b[31m\rstep 1\r\n"
        return LogPage(text=text, next=9, done=True, attempt=1, rank=0)


def test_check_keeps_the_home_of_the_settings_and_shows_no_secret(tmp_path):
    path = tmp_path / "service.yaml"
    path.write_text(SETTINGS)
    for options in ([], ["--json"]):
        done = CliRunner().invoke(app, ["serve", "--settings", str(path), "--check", *options])
        assert done.exit_code == 0, done.output
        shown = json.loads(done.stdout)
        assert shown["home"] == "/srv/maskray"
        assert shown["ledger"] == "postgresql+psycopg://maskray:***@db/maskray"
        assert shown["webhook"] == "https://chat.example.org/***"
        assert "of-ledger" not in done.output
        assert "secret-of" not in done.output
    options = ["serve", "--settings", str(path), "--home", "/other", "--check"]
    assert json.loads(CliRunner().invoke(app, options).stdout)["home"] == "/other"


def test_a_user_who_has_a_token_gets_another_one_on_purpose_only(monkeypatch):
    client = FakeClient()
    monkeypatch.setattr(service, "open_client", lambda: client)
    refused = CliRunner().invoke(app, ["user", "bob"])
    assert "bob has a token already, with role 'admin'; --yes" in str(refused.exception)
    assert client.made == []
    assert CliRunner().invoke(app, ["user", "bob", "--yes"]).stdout == "t" * 20 + "\n"
    assert CliRunner().invoke(app, ["user", "new"]).stdout == "t" * 20 + "\n"
    assert client.made == ["bob", "new"]
    assert CliRunner().invoke(app, ["users"]).stdout == "bob  admin\n"


def test_ui_neither_waits_for_an_mlflow_that_will_not_come_nor_takes_a_trial_for_a_study(
    monkeypatch,
):
    client = FakeClient()
    monkeypatch.setattr(service, "open_client", lambda: client)
    refused = CliRunner().invoke(app, ["ui"])
    assert "the service runs without MLflow" in str(refused.exception)
    assert client.asked == 1
    monkeypatch.setattr(service, "is_trial", lambda *_: True)
    monkeypatch.setattr(service, "trial_id", lambda _, name: name)
    with pytest.raises(ValueError, match="--parent: is for a study, and s-000 is a trial"):
        service.mlflow_page(client, "http://mlflow", "s-000", parent=True)


def test_names_are_shown_as_they_are(capsys):
    entry = QueueEntry(
        trial="t",
        key="lr=[low]/seed-0 [/bold]\x1b[31m",
        study="s",
        study_name="[red]s",
        owner="ann",
        state="queued",
        priority=0,
        position=1,
        needs="1 CPU",
        why="behind trial [x]",
    )
    view_of_queue = QueueView(running=[], queue=[entry])
    print_queue(view_of_queue.running, view_of_queue.queue)
    shown = capsys.readouterr().out
    for words in (r"lr=[low]/seed-0 [/bold]\x1b[31m", "[red]s", "behind trial [x]"):
        assert words in shown
    assert "\x1b" not in shown


def test_a_log_moves_no_cursor(monkeypatch):
    monkeypatch.setattr(show, "open_client", FakeClient)
    monkeypatch.setattr(show, "trial_id", lambda _, trial: trial)
    shown = CliRunner().invoke(app, ["logs", "t"]).stdout
    assert shown == "\\x1b]0;title\\x07red \\x1b[31m\nstep 1\n"


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        (Forgotten(study="s", folder="/f/s", bytes=3 << 29), "1.50 GiB in /f/s"),
        (Forgotten(study="s", folder="/f/s", whole=False), "more than 0.00 GiB in /f/s"),
        (ValueError("s: has folders nested too deep"), "not known: s: has folders nested too deep"),
    ],
)
def test_status_says_what_a_study_takes_or_why_nobody_knows(monkeypatch, counted, words):
    class Client(FakeClient):
        def study(self, study: str) -> StudyView:
            fixed: dict[str, Any] = {"state": "done", "spec": {}, "priority": 0}
            return StudyView(study=study, name="s", owner="eve", created_at=0, storage="", **fixed)

        def page_link(self, study: str) -> str:
            return "http://page"

        def keeps(self, study: str) -> Forgotten:
            if isinstance(counted, ValueError):
                raise counted
            return counted

    monkeypatch.setattr(show, "open_client", Client)
    monkeypatch.setattr(show, "study_id", lambda _, study: study)
    done = CliRunner().invoke(app, ["status", "s"])
    assert done.exit_code == 0, done.output
    assert f"disk: {words}\n" in done.stdout


def test_gc_refuses_an_age_beside_forgotten_folders():
    done = CliRunner().invoke(app, ["gc", "--forgotten", "--checkpoints-days", "3"])
    assert "--checkpoints-days has no effect with --forgotten" in str(done.exception)
