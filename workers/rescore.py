"""`python -m workers.rescore TRIAL_FOLDER`: scores the detections that a finished run left."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from contract.attempt import RESULT_FILE, Result
from contract.command import add_output_options, run_command
from contract.files import Files
from workers.inference.trained import run_config
from workers.training.build import open_datasets
from workers.training.evaluate import Scores, score
from workers.training.results import CocoResult

_DETECTIONS = "detections/"  # the names of these artifacts in a result


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="maskray rescore", description=__doc__)
    parser.add_argument("folder", metavar="TRIAL_FOLDER", help="folder or URI of a finished run")
    parser.add_argument("--data", default="", help="packed validation set; default: the run's own")
    add_output_options(parser)
    return run_command(lambda: _rescore(parser.parse_args(argv)), argv)


def _rescore(arguments: argparse.Namespace) -> int:
    print(json.dumps(rescore(Files(arguments.folder), arguments.data).metrics))
    return 0


def rescore(storage: Files, data: str = "") -> Scores:
    """The scores by this version's scorer. data: validation set in the place of the run's own.

    Raises ValueError if the run left no detections, or the data do not fit it.
    """
    run = run_config(storage)
    if data:
        run = run.model_copy(update={"data": run.data.model_copy(update={"val": data})})
    try:
        result = Result.model_validate_json(storage.read(RESULT_FILE))
    except FileNotFoundError:
        raise ValueError(f"{storage.uri}: has no {RESULT_FILE}; the run is not finished") from None
    detections: dict[str, list[CocoResult]] = {
        name.removeprefix(_DETECTIONS): json.loads(storage.read(path))
        for name, path in result.artifacts.items()
        if name.startswith(_DETECTIONS)
    }
    if not detections:
        raise ValueError(f"{storage.uri}: its {RESULT_FILE} names no detections")
    # as the run itself opened them: aligned with its categories, and filtered
    _, val = open_datasets(run, cache="")
    return score(val.for_evaluation(run.data), detections, run.loop.eval_boundary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
