"""`maskray backup` and `maskray restore`, on the host of a service."""

from __future__ import annotations

import shutil
import time
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import JsonValue

from contract.files import file_sha256
from contract.record import Message, parse_record
from orchestrator.cli.options import AsJson, Debug, print_result

if TYPE_CHECKING:
    from orchestrator.settings import ServiceSettings

_ABOUT, _SETTINGS, _LEDGER, _CODE = "about.json", "settings.json", "ledger", "code"
# Files of the service's home: the administrator's token, what signs links to reports, and what the
# MLflow logins of trials that run are computed from.
_SECRETS, _SECRET_NAMES = "secrets", ("token", "link-key", "mlflow-logins-key")

Settings = Annotated[Path | None, typer.Option(help="The service's YAML file of settings.")]
Home = Annotated[str, typer.Option(help="Folder of the service's own files; default: .maskray.")]


class About(Message):
    """What a backup is: `about.json`, which is written last."""

    made_at: float
    database: str  # "sqlite" or "postgresql"
    files: dict[str, str]  # path -> SHA-256


def register(app: typer.Typer) -> None:
    for command in (backup, restore):
        app.command()(command)


def backup(
    folder: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    settings: Settings = None,
    home: Home = "",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Copy a service's ledger, settings, keys and code packages, also while it runs."""
    from orchestrator.ledger import backup as copies
    from orchestrator.ledger.opening import Ledger
    from orchestrator.local.processes import write_private
    from orchestrator.settings import code_files, ledger_url

    if folder.exists():
        raise ValueError(f"{folder}: exists already; name a new folder")
    record = _settings(settings, home)
    url = ledger_url(record)
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        raise ValueError(f"{url}: there is no ledger; name the service's --settings or --home")
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / _CODE).mkdir(parents=True, mode=0o700)
    aside.chmod(0o700)  # the ledger knows every user, the settings a password
    ledger = Ledger(url, migrate=False)
    try:
        copies.dump(ledger, aside / _LEDGER)
        database = ledger.engine.dialect.name
    finally:
        ledger.close()
    (aside / _SETTINGS).write_text(record.model_dump_json(indent=1))
    (aside / _SECRETS).mkdir(mode=0o700)
    for name in _SECRET_NAMES:
        if (Path(record.home) / name).exists():
            write_private(aside / _SECRETS / name, (Path(record.home) / name).read_text("utf-8"))
    # after the ledger: each study that it holds has sent its package before
    packages = code_files(record)
    for name in packages.names():
        if name.endswith(".zip"):
            (aside / _CODE / name).write_bytes(packages.read(name))
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    sums = {path.relative_to(aside).as_posix(): file_sha256(path) for path in paths}
    about = About(made_at=time.time(), database=database, files=sums)
    (aside / _ABOUT).write_text(about.model_dump_json(indent=1))
    aside.rename(folder)
    num_packages = sum(name.startswith(f"{_CODE}/") for name in sums)
    said = f"{folder}: the ledger ({database}), settings, keys and {num_packages} code packages"
    print_result({"folder": str(folder), "files": len(sums)}, said, json)


def restore(
    folder: Annotated[Path, typer.Argument(help="A folder that `maskray backup` made.")],
    settings: Settings = None,
    home: Home = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Also over a ledger that holds studies.")
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put a backup back, while no service runs. The next one adopts or ends what runs."""
    from orchestrator.ledger import backup as copies
    from orchestrator.settings import code_files, ledger_url

    record = _settings(settings, home)
    if not (folder / _ABOUT).exists():
        raise ValueError(f"{folder}: holds no {_ABOUT}: it is no whole backup")
    about = About.model_validate_json((folder / _ABOUT).read_text("utf-8"))
    for name, sha256 in about.files.items():
        if ".." in Path(name).parts or not (folder / name).is_file():
            raise ValueError(f"{folder}/{name}: is missing; take another backup")
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{folder}/{name}: its bytes have changed; take another backup")
    url = ledger_url(record)
    database = "sqlite" if url.startswith("sqlite") else "postgresql"
    if database != about.database:
        raise ValueError(f"{folder}: is of {about.database}, and `ledger` is {database}")
    changes = copies.load(url, folder / _LEDGER, replace, time.time())
    packages = code_files(record)
    missing = [name for name in about.files if name.startswith(f"{_CODE}/")]
    for name in missing:
        plain = name.removeprefix(f"{_CODE}/")
        if not packages.exists(plain):
            packages.write(plain, (folder / name).read_bytes())
    changes += _restore_secrets(folder, about, Path(record.home))
    changes += _other_settings(folder / _SETTINGS, record)
    restored = time.ctime(about.made_at)
    lines = [f"restored the ledger of {restored}", *changes]
    lines.append("the next service adopts or ends what runs: events `adopted`, `orphan`, `mended`")
    print_result({"made_at": about.made_at, "changes": changes}, "\n".join(lines), json)


def _restore_secrets(folder: Path, about: About, home: Path) -> list[str]:
    """They belong to the ledger: what people and trials have from the service stays valid."""
    from orchestrator.local.processes import write_private

    written = []
    for name in _SECRET_NAMES:
        if f"{_SECRETS}/{name}" not in about.files:
            continue
        text = (folder / _SECRETS / name).read_text("utf-8")
        if not (home / name).exists() or (home / name).read_text("utf-8") != text:
            write_private(home / name, text)
            written.append(name)
    return [f"{home}: the backup's {', '.join(written)}"] if written else []


def _other_settings(path: Path, record: ServiceSettings) -> list[str]:
    """The names alone: values may be secrets. The machine may be another one by intent."""
    before: dict[str, JsonValue] = loads(path.read_text("utf-8"))
    now = record.model_dump(mode="json")
    differ = [name for name in now if before.get(name, now[name]) != now[name]]
    text = f"{path}: these settings differ from those here, which stay: {', '.join(differ)}"
    return [text] if differ else []


def _settings(path: Path | None, home: str) -> ServiceSettings:
    from orchestrator.settings import ServiceSettings, read_settings

    chosen = read_settings(path) if path is not None else {}
    chosen["home"] = str(Path(home or chosen.get("home", ".maskray")).absolute())
    return parse_record(ServiceSettings, chosen, str(path or "settings"))
