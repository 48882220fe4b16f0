"""`python -m workers.sync SPOOL_OR_TRIAL_FOLDER`: ships what a run could not tell its tracker while it lasted."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from contract.command import run_command
from contract.files import Files
from workers.tracking.scribe import SPOOL_FOLDER, TARGET_FILE, SpoolTarget, build_target
from workers.tracking.spool import Spool, ship_once


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="maskray sync", description="Sends a run's unsent records to its tracker."
    )
    parser.add_argument("folder", metavar="SPOOL_OR_TRIAL_FOLDER", help="a path or a URI")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _sync(arguments.folder, arguments.json), argv)


def _sync(where: str, as_json: bool) -> int:
    sent = sync(where)
    print(json.dumps({"sent": sent}) if as_json else f"{sent} records sent")
    return 0


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def sync(where: str) -> int:
    """Ships all unsent records of a spool; returns how many. Raises RuntimeError if the tracker cannot be reached."""
    remote = Files(where)
    names = remote.names("")
    if TARGET_FILE not in names:
        if SPOOL_FOLDER not in names:
            raise ValueError(
                f"{where}: has no {TARGET_FILE} and no folder {SPOOL_FOLDER!r}; give a spool or a trial's folder"
            )
        folder_uri, mark, query = where.partition("?")
        remote = Files(f"{folder_uri.rstrip('/')}/{SPOOL_FOLDER}{mark}{query}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = remote.local or Path(scratch)
        if remote.local is None:
            for name in remote.names(""):
                remote.fetch(name, folder)
        target = SpoolTarget.model_validate_json((folder / TARGET_FILE).read_bytes())
        sender = build_target(target.tracking, target, Files(target.storage))
        if sender is None:
            raise ValueError(
                f"{where}: its run has no tracker; resume it with one (--mlflow), which sends all of it"
            )
        spool = Spool(folder, take=False, warn=tell)  # its run may be alive
        total = 0
        try:
            while batch := spool.unsent():
                ship_once(spool, sender, tell)
                total += len(batch)
        except Exception as error:
            left = f"{total} records sent, the others stay in {where}"
            raise RuntimeError(
                f"{target.tracking.kind} cannot be reached: {str(error).splitlines()[0]}; {left}"
            ) from error
        finally:
            spool.close()
            if remote.local is None:
                remote.write("cursor.json", json.dumps({"bytes": spool.cursor}).encode())
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
