"""`python -m workers.sync SPOOL_OR_TRIAL_FOLDER`: ships the records that a run left unsent."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.attempt import MLflowTracking
from contract.command import add_output_options, run_command
from contract.files import Files, uri_join
from contract.machine.folders import scratch
from contract.words import one_line
from workers.tracking.mlflow_tracker import MLflowTracker
from workers.tracking.shipper import ship_once, ship_postponed
from workers.tracking.spool import DESTINATION_FILE, LATER, SPOOL_FOLDER, Destination, Spool


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="maskray sync", description="Sends a run's unsent records to its tracker."
    )
    parser.add_argument("folder", metavar="SPOOL_OR_TRIAL_FOLDER", help="a path or a URI")
    parser.add_argument(
        "--mlflow",
        default=os.environ.get("MLFLOW_TRACKING_URI", ""),
        metavar="URI",
        help="the MLflow server or store of a run that was trained without one "
        "(default: MLFLOW_TRACKING_URI)",
    )
    parser.add_argument(
        "--experiment",
        default="maskray",
        help="with --mlflow: MLflow experiment (default: maskray)",
    )
    parser.add_argument(
        "--parent", default="", metavar="RUN_ID", help="with --mlflow: the run that it belongs to"
    )
    add_output_options(parser)
    return run_command(lambda: _sync(parser.parse_args(argv)), argv)


def _sync(arguments: argparse.Namespace) -> int:
    tracker = None
    if arguments.mlflow:
        tracker = MLflowTracking(
            uri=arguments.mlflow, experiment=arguments.experiment, parent_run_id=arguments.parent
        )
    sent = sync(arguments.folder, tracker)
    print(json.dumps({"sent": sent}) if arguments.json else f"{sent} records sent")
    return 0


def _warn(text: str) -> None:
    print(text, file=sys.stderr)  # stdout holds the answer alone


def sync(where: str, other: MLflowTracking | None = None) -> int:
    """Ships all unsent records of a spool; returns how many.

    other: the tracker of a run that has none. The spool keeps it, as if the run had begun with it.

    Raises ValueError if there is no spool or no tracker, RuntimeError if the tracker cannot be
    reached or some artifact cannot be stored.
    """
    remote = _spool_at(where)
    with scratch("sync") as fetched:
        folder = remote.local or Path(fetched)
        if remote.local is None:
            for name in remote.names(""):
                remote.fetch(name, folder)
        destination = Destination.model_validate_json((folder / DESTINATION_FILE).read_bytes())
        tracking = destination.tracking
        if not isinstance(tracking, MLflowTracking):
            if other is None:
                raise ValueError(f"{where}: its run has no tracker; name one with --mlflow URI")
            tracking = other
            destination = destination.model_copy(update={"tracking": other})
        storage = Files(destination.storage)
        tracker = MLflowTracker(tracking, destination.trial, destination.name, storage, _warn)
        spool = Spool(folder, take=False, warn=_warn)  # the run may be alive: it keeps its spool
        total = 0
        try:
            while sent := ship_once(spool, tracker, _warn):
                total += sent
            total += ship_postponed(spool, tracker, _warn)
            remote.write(DESTINATION_FILE, destination.model_dump_json(indent=1).encode())
        except Exception as error:
            left = f"{total} records sent, the others stay in {where}"
            raise RuntimeError(
                f"{tracking.kind} cannot be reached: {one_line(error)}; {left}"
            ) from error
        finally:
            spool.close()
            if remote.local is None:
                # also after an error: the next call then goes on where this one stopped
                remote.write("cursor.json", json.dumps({"bytes": spool.cursor}).encode())
                _copy_postponed(folder, remote)
        if later := spool.postponed():
            raise RuntimeError(
                f"{total} records sent, {len(later)} artifacts stay in {where}: "
                f"{later[0].record.path}: {later[0].reason}"
            )
    return total


def destination_at(where: str) -> Destination:
    """Where a run sends its records, from its folder or its spool.

    Raises ValueError if there is no spool.
    """
    return Destination.model_validate_json(_spool_at(where).read(DESTINATION_FILE))


def _copy_postponed(folder: Path, remote: Files) -> None:
    """The remote spool then has the artifacts that wait in `folder`, and no other."""
    here = {path.name: path for path in folder.glob(f"{LATER}*")}
    there = {name for name in remote.names("") if name.startswith(LATER)}
    for name in there - here.keys():
        remote.delete(name)
    for name in here.keys() - there:
        remote.write(name, here[name].read_bytes())


def _spool_at(where: str) -> Files:
    """The spool itself, or the one in a trial's folder. Raises ValueError if there is none."""
    storage = Files(where)
    names = storage.names("")
    if DESTINATION_FILE in names:
        return storage
    if SPOOL_FOLDER not in names:
        raise ValueError(
            f"{where}: has no {DESTINATION_FILE} and no folder {SPOOL_FOLDER!r}; "
            "give a spool or a trial's folder"
        )
    return Files(uri_join(where, SPOOL_FOLDER))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
