"""Gives PostgreSQL the roles and databases of compose, with the passwords that the secrets hold.

It runs at each `docker compose up`, so a new password counts. It comes through the server's socket,
which its own volume shares with nobody else: so it needs no password itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg
from psycopg import sql

# role and database -> the secret with its password; the first is the server's own administrator
OWN = "postgres"
DATABASES = {"ledger": "ledger_password", "mlflow": "mlflow_database_password"}


def main(socket: str, secrets: Path) -> None:
    """Makes what is missing; says what it made."""
    with psycopg.connect(host=socket, user=OWN, dbname=OWN, autocommit=True) as server:
        _set_password(server, OWN, _secret(secrets, "postgres_password"))
        for name, secret in DATABASES.items():
            if not _exists(server, "pg_roles", "rolname", name):
                server.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
                print(f"made role {name}")
            _set_password(server, name, _secret(secrets, secret))
            if not _exists(server, "pg_database", "datname", name):
                made = sql.SQL("CREATE DATABASE {0} OWNER {0}").format(sql.Identifier(name))
                server.execute(made)
                print(f"made database {name}")
            # by default every role may connect to every database
            server.execute(
                sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name))
            )


def _exists(server: psycopg.Connection, table: str, column: str, name: str) -> bool:
    query = sql.SQL("SELECT 1 FROM {} WHERE {} = %s")
    query = query.format(sql.Identifier(table), sql.Identifier(column))
    return server.execute(query, [name]).fetchone() is not None


def _set_password(server: psycopg.Connection, role: str, password: str) -> None:
    # a statement of this kind takes no parameters
    change = sql.SQL("ALTER ROLE {} PASSWORD {}")
    server.execute(change.format(sql.Identifier(role), sql.Literal(password)))


def _secret(folder: Path, name: str) -> str:
    return (folder / name).read_text("utf-8").strip()


if __name__ == "__main__":
    main(sys.argv[1], Path(os.environ.get("MASKRAY_SECRETS", "/run/secrets")))
