"""Makes the secrets of docker-compose.yml, and the folders that its services keep their data in.

A secret is a file that only you can read. One that exists stays as it is; delete its file and run
this again for a new one, then `docker compose up`. The services run as the user who ran this.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from urllib.parse import quote

RANDOM = (
    *("service_token", "ray_token", "mlflow_password", "mlflow_session_key"),
    *("postgres_password", "ledger_password", "mlflow_database_password"),
    *("s3_root_password", "s3_studies_password", "s3_mlflow_password"),
)
FOLDERS = ("postgres", "s3", "service")  # one for each service that keeps data


def main(root: Path) -> None:
    """Writes ROOT/secrets, ROOT/data and .env beside docker-compose.yml."""
    os.umask(0o077)
    folder = root / "secrets"
    folder.mkdir(parents=True, exist_ok=True)
    made = [name for name in RANDOM if _make(folder / name)]
    for name, text in _derived({name: (folder / name).read_text().strip() for name in RANDOM}):
        _write(folder / name, text)
    for name in FOLDERS:
        (root / "data" / name).mkdir(parents=True, exist_ok=True)
    (root / "datasets").mkdir(exist_ok=True)  # MASKRAY_DATA, unless that is set
    _set_user(Path(".env"))
    print(f"{folder}: {', '.join(made) or 'nothing'} made, {len(RANDOM) - len(made)} kept")


def _make(file: Path) -> bool:
    if file.exists():
        if not file.read_text().strip():
            sys.exit(f"error: {file} is empty; delete it, and `make secrets` makes a new one")
        return False
    _write(file, secrets.token_urlsafe(32))
    return True


def _derived(known: dict[str, str]) -> list[tuple[str, str]]:
    """What programs read in a form of their own. Written again each time, from the passwords."""

    def url(user: str, password: str) -> str:
        return f"postgresql+psycopg://{user}:{quote(known[password], safe='')}@postgres:5432/{user}"

    def profile(user: str) -> str:
        return (
            "[default]\n"
            f"aws_access_key_id = {user}\n"
            f"aws_secret_access_key = {known[f's3_{user}_password']}\n"
        )

    return [
        ("ledger_url", url("ledger", "ledger_password")),
        ("mlflow_url", url("mlflow", "mlflow_database_password")),
        ("mlflow_login", f"admin:{known['mlflow_password']}"),
        ("s3_studies.ini", profile("studies")),
        ("s3_mlflow.ini", profile("mlflow")),
    ]


def _set_user(file: Path) -> None:
    """Compose reads .env. It holds no secret, and other lines of it stay."""
    lines = file.read_text().splitlines() if file.exists() else []
    own = {"MASKRAY_UID": os.getuid(), "MASKRAY_GID": os.getgid()}
    kept = [line for line in lines if line.partition("=")[0] not in own]
    file.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in own.items()), ""]))


def _write(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
        sink.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".compose"))
