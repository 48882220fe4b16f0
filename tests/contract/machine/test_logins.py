"""Where a login of MLflow is read: its URI, variables, a file."""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path

import pytest

from contract.machine.logins import NAME, PASSWORD, authorization, configuration_of, login_in

TOKEN = {"MLFLOW_TRACKING_TOKEN": "t"}


@pytest.mark.parametrize(
    ("uri", "variables", "url", "header"),
    [
        ("http://m:5000/", {}, "http://m:5000", ""),
        ("http://m:5000/x/", TOKEN, "http://m:5000/x", "Bearer t"),
        ("http://m", {NAME: "ann", PASSWORD: "p", **TOKEN}, "http://m", "Basic YW5uOnA="),
        # ann:p, and ann:p@
        ("http://ann:p@[::1]:5000", {NAME: "bob"}, "http://[::1]:5000", "Basic YW5uOnA="),
        ("https://ann:p%40@m", TOKEN, "https://m", "Basic YW5uOnBA"),
    ],
)
def test_a_login_is_the_uri_s_else_a_user_s_else_a_token(
    uri: str, variables: Mapping[str, str], url: str, header: str
) -> None:
    assert authorization(uri, variables) == (url, header)


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    file = tmp_path / "login"
    file.write_text("ann:p:q\n")
    assert login_in(file) == ("ann", "p:q")
    for text in ("ann", ":p", "ann:"):
        file.write_text(text)
        with pytest.raises(ValueError, match="login: is not USER:PASSWORD"):
            login_in(file)


def test_a_database_s_url_is_read_back_as_it_was() -> None:
    read = configparser.ConfigParser()
    read.read_string(configuration_of("postgresql://m:p%40@db/mlflow", "ann"))
    section = read["mlflow"]
    assert section["database_uri"] == "postgresql://m:p%40@db/mlflow"
    assert (section["admin_username"], section["default_permission"]) == ("ann", "NO_PERMISSIONS")
