"""Logins of MLflow: in its URI, in variables, or in a file; and what its server is told of them."""

from __future__ import annotations

import base64
import configparser
import io
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"  # as MLflow names them


def authorization(uri: str, variables: Mapping[str, str]) -> tuple[str, str]:
    """The URI without its login, and the header `Authorization` for it; empty without a login.

    As MLflow's client takes it: the URI's own login, else a user's, else a token.
    """
    parts = urlsplit(uri)
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not user:
        user, password = variables.get(NAME, ""), variables.get(PASSWORD, "")
    if user:
        return url, f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    token = variables.get("MLFLOW_TRACKING_TOKEN", "")
    return url, f"Bearer {token}" if token else ""


def login_in(path: Path) -> tuple[str, str]:
    """User and password in a file of USER:PASSWORD. Raises ValueError for another form."""
    user, colon, password = path.read_text("utf-8").strip().partition(":")
    if not (user and colon and password):
        raise ValueError(f"{path}: is not USER:PASSWORD of an MLflow administrator")
    return user, password


def configuration_of(database: str, administrator: str) -> str:
    """The file of MLFLOW_AUTH_CONFIG_PATH, for a server that asks for a login.

    database: URL of the one of its users.
    """
    configuration = configparser.ConfigParser()
    configuration["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": database.replace("%", "%%"),  # "%" begins a reference in such a file
        "admin_username": administrator,
        # A login is a slow hash: without a cache each request costs one. The cache is each worker's
        # own, so a login that was taken away still counts there for so long.
        "auth_cache_ttl_seconds": "30",
    }
    text = io.StringIO()
    configuration.write(text)
    return text.getvalue()
