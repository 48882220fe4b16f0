"""Starts an MLflow server with login. Its options are those of `mlflow server`.

Secrets are files: the database's URL, the session key and the administrator's USER:PASSWORD. MLflow
reads a password from its configuration once, when it makes the user. Here a changed file counts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from contract.machine.logins import configuration_of, login_in


def main(options: list[str], secrets: Path) -> None:
    """Becomes the server."""
    url = (secrets / "mlflow_url").read_text("utf-8").strip()
    user, password = login_in(secrets / "mlflow_login")
    os.environ |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(_write_configuration(url, user)),
        "MLFLOW_BACKEND_STORE_URI": url,
        # what signs the forms of MLflow's login pages
        "MLFLOW_FLASK_SERVER_SECRET_KEY": (secrets / "mlflow_session_key").read_text().strip(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    _set_administrator(url, user, password)
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *options]
    os.execv(command[0], command)


def _write_configuration(url: str, user: str) -> Path:
    file = Path(tempfile.mkdtemp(prefix="mlflow-")) / "basic_auth.ini"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
        sink.write(configuration_of(url, user))
    return file


def _set_administrator(url: str, user: str, password: str) -> None:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(url)
    if not store.has_user(user):
        store.create_user(user, password, is_admin=True)
    elif not store.authenticate_user(user, password):
        store.update_user(user, password=password, is_admin=True)
    store.engine.dispose()


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ.get("MASKRAY_SECRETS", "/run/secrets")))
