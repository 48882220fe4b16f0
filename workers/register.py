"""`python -m workers.register TRIAL --name NAME`: weights as a version of a model in MLflow."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from contract.attempt import CATEGORIES_FILE, CONFIG_FILE
from contract.command import SUCCESS, add_output_options, run_command
from contract.files import Files, file_sha256
from contract.machine.folders import scratch
from contract.words import one_line
from workers.inference.files import WEIGHTS, Which, check_written
from workers.sync import destination_at, sync
from workers.tracking.mlflow_tracker import MLflowTracker, add_version, version_of
from workers.tracking.spool import print_warning

# The folder among the artifacts of the trial's run. Below it lie the files that a run's folder has,
# by their names there: what MLflow gives back is a folder that `maskray predict` takes.
_FOLDER = "model"


@dataclass(frozen=True)
class Registered:
    """A model version. tracker: MLflow's URI. unchanged: these weights of this run were one."""

    model: str
    version: str
    run_id: str
    tracker: str
    unchanged: bool


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="maskray register",
        description="Makes the weights of a finished trial a version of a registered model.",
    )
    parser.add_argument("trial", metavar="TRIAL", help="a trial (STUDY:KEY) or a run's folder")
    parser.add_argument("--name", required=True, help="of the model in MLflow")
    parser.add_argument(
        "--weights", choices=sorted(WEIGHTS), default="last", help="which (default: %(default)s)"
    )
    parser.add_argument("--alias", default="", help="also let this alias mean the version")
    add_output_options(parser)
    return run_command(lambda: _register(parser.parse_args(argv)), argv)


def _register(arguments: argparse.Namespace) -> int:
    done = register(arguments.trial, arguments.name, arguments.weights, arguments.alias)
    uri = f"models:/{done.model}/{done.version}"
    was = " (was there already, unchanged)" if done.unchanged else ""
    # A URI may hold a password, which no log should.
    server = "" if "@" in done.tracker else f"export MLFLOW_TRACKING_URI={done.tracker}\n"
    text = f"{uri}{was}\n{server}{_use(uri, arguments.weights)}"
    content = asdict(done) | {"tracker": "" if not server else done.tracker}
    print(json.dumps(content) if arguments.json else text)
    return SUCCESS


def register(where: str, name: str, weights: Which = "last", alias: str = "") -> Registered:
    """Copies weights, configuration and classes of a run into MLflow and makes them a version.

    weights: "last" or "best". What the run could not send to MLflow is sent before. Raises
    ValueError if there are no such weights or the run has no tracker, RuntimeError if MLflow does
    not take them.
    """
    storage, file = Files(where), WEIGHTS[weights]
    check_written(storage, file)
    sync(where)
    destination = destination_at(where)
    assert destination.tracking.kind == "mlflow"  # else `sync` has refused
    tracker = MLflowTracker(
        destination.tracking, destination.trial, destination.name, storage, print_warning
    )
    try:
        client = tracker.connect(create=False)
        with scratch("register") as folder:
            local = storage.fetch(file, Path(folder))
            mark = f"{weights}-{file_sha256(local)}"
            # A folder of their own: later weights of the run change no earlier version.
            kept = f"{_FOLDER}/{mark}"
            there = version_of(client, name, tracker.run_id, mark)
            if there is None:
                # A run of an older version has no file of categories.
                others = [path for path in (CONFIG_FILE, CATEGORIES_FILE) if storage.exists(path)]
                for path in (*others, file):
                    copy = local if path == file else storage.fetch(path, Path(folder))
                    parent = f"{kept}/{Path(path).parent}"
                    client.log_artifact(tracker.run_id, str(copy), parent)
        version = there or add_version(client, name, tracker.run_id, kept, mark)
        if there is None:
            words = f"{weights} weights of {destination.name}, {destination.trial}"
            use = _use(f"models:/{name}/{version}", weights)
            client.update_model_version(name, version, f"{words}.\n\n{use}")
        if alias:
            client.set_registered_model_alias(name, alias, version)
    except Exception as error:
        raise RuntimeError(f"{name}: MLflow does not register it: {one_line(error)}") from error
    return Registered(
        name, version, tracker.run_id, destination.tracking.uri, unchanged=there is not None
    )


def _use(uri: str, weights: str) -> str:
    """How the version is used."""
    which = "" if weights == "last" else f" --weights {weights}"
    return (
        f"mlflow artifacts download -u {uri} -d DIR\n"
        f"maskray predict DIR IMAGES... --out PICTURES{which}"
    )


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
