"""`python -m workers.train RUN.yaml`: one run without Ray; under torchrun, one run on as many ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from contract.attempt import (
    CHECKPOINT_FOLDER,
    RESULT_FILE,
    SPEC_FILE,
    STOP_FILE,
    MLflowTracking,
    NoTracking,
    Outcome,
    Progress,
    RunSpec,
)
from contract.command import run_command
from contract.files import Files
from contract.presets import run_preset
from contract.recipe import apply_overrides, parse_run
from contract.words import one_line


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _train(arguments), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskray train", description="Trains one run; started again, it resumes."
    )
    parser.add_argument(
        "run", metavar="RUN.yaml", help="a run file; it may begin with `preset: NAME`"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a dotted override, e.g. model.roi.kind=pool",
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="the run's folder or URI (default: runs/NAME)"
    )
    parser.add_argument(
        "--mlflow", default="", metavar="URI", help="track to this MLflow server or store"
    )
    parser.add_argument(
        "--experiment", default="maskray", help="MLflow experiment (default: %(default)s)"
    )
    parser.add_argument(
        "--cpus-per-rank",
        type=int,
        default=0,
        metavar="N",
        help="threads of a rank on the CPU (default: this machine's cores / ranks on it); "
        "of two runs on one machine give each its share, or both crawl",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="from a stop request to the end by force, if no checkpoint was reached (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    # imported here so that `--help` and mistakes in the run file answer at once
    from workers.tracking.console import progress_shower, show_nothing
    from workers.training.run import run_trial
    from workers.training.world import launched_world
    from workers.trial.causes import exit_status, write_outcome
    from workers.trial.stop import (
        Reason,
        StopRequest,
        files_asking,
        grace_enforced,
        late_outcome,
        signals_asking,
    )

    if arguments.cpus_per_rank < 0:
        raise ValueError(
            f"--cpus-per-rank {arguments.cpus_per_rank}: give 1 or more, or leave it out"
        )
    if not arguments.grace_s > 0:
        raise ValueError(f"--grace-s {arguments.grace_s:g}: give more than 0 seconds")
    run = parse_run(read_run(Path(arguments.run), arguments.set), arguments.run)
    out = arguments.out or f"runs/{Path(arguments.run).stem}"
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_asking(stop))
        if arguments.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        world = stack.enter_context(launched_world(os.environ))
        storage = Files(out)
        old_request = world.is_first and storage.exists(STOP_FILE)
        attempt, trial = world.from_first(next_attempt(storage) if world.is_first else (0, ""))
        spec = RunSpec(
            run=run,
            storage=out if storage.local is None else str(storage.local),
            trial=trial,
            name=Path(out).name,
            attempt=attempt,
            ranks=world.size,
            cpus_per_rank=arguments.cpus_per_rank or share_of_cores(os.environ),
            grace_s=arguments.grace_s,
            tracking=MLflowTracking(uri=arguments.mlflow, experiment=arguments.experiment)
            if arguments.mlflow
            else NoTracking(),
        )
        show: Callable[[Progress], None] = show_nothing
        if world.is_first:
            storage.write(
                SPEC_FILE.format(attempt=attempt), spec.model_dump_json(indent=1).encode()
            )
            show = progress_shower()
            if world.device.type == "cpu":
                print(f"{spec.cpus_per_rank:.0f} thread(s) a rank (--cpus-per-rank)", flush=True)

        def claimed() -> None:
            if (
                old_request
            ):  # to the run that this one resumes; until here it might have been to one that lives
                storage.delete(STOP_FILE)
            stack.enter_context(files_asking(stop, storage, attempt, lambda: False, print))

        def leave(reason: Reason) -> None:
            late = late_outcome(reason, spec.grace_s)
            if world.is_first:
                write_outcome(storage, attempt, late)
            print(f"{late.state}: {late.error}", file=sys.stderr, flush=True)
            os._exit(exit_status(late))

        stack.enter_context(grace_enforced(stop, spec.grace_s, leave))
        outcome = run_trial(spec, world, stop, show, claimed)
    if world.is_first:
        _report(outcome, storage, arguments)
    return exit_status(outcome)


def read_run(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Nested data of a run file with `PATH=VALUE` overrides. Raises ValueError with one line."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; give a run file, e.g. with `preset: tiny` and `data: ...`"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give a run file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: holds {type(data).__name__}, a run is a mapping with `data:`, maybe `preset:`"
        )
    name = data.pop("preset", None)
    if not isinstance(name, str | None):
        raise ValueError(f"{path}: preset: {name!r} is no name; write e.g. `preset: tiny`")
    try:
        base = {} if name is None else run_preset(name)
    except ValueError as error:
        raise ValueError(f"{path}: preset: {error}") from None
    pairs = {}
    for override in overrides:
        field, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: has no '='; write --set path=value")
        try:
            pairs[field] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"--set {override}: the value is not YAML: {one_line(error)}"
            ) from None
    return apply_overrides(merged(base, data), pairs)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the nested fields of `over`; a record of another `kind` replaces the whole record."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def share_of_cores(environment: Mapping[str, str]) -> int:
    """The cores that this process may use, divided by the ranks that torchrun started on this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(cores // int(environment.get("LOCAL_WORLD_SIZE", "1")), 1)


def next_attempt(storage: Files) -> tuple[int, str]:
    """One more than the last attempt that claimed this folder or was refused, and the trial's id.

    The tracker knows the trial by its id, so two folders of one name have two.
    """
    try:
        last = int(storage.read_json(f"{CHECKPOINT_FOLDER}/claim.json")["attempt"])
    except FileNotFoundError:
        last = 0
    last = max([last, *(int(name) for name in storage.names("attempts") if name.isdecimal())])
    specs = [SPEC_FILE.format(attempt=attempt) for attempt in range(last, 0, -1)]
    known = next(
        (str(storage.read_json(spec)["trial"]) for spec in specs if storage.exists(spec)), ""
    )
    name = storage.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return last + 1, known or f"{name}-{uuid4().hex[:8]}"


def _report(outcome: Outcome, storage: Files, arguments: argparse.Namespace) -> None:
    done = outcome.state == "done"
    metrics = storage.read_json(RESULT_FILE)["metrics"] if done else {}
    if arguments.json:
        error = {"error": outcome.error} if outcome.error else {}
        print(
            json.dumps(
                {
                    "state": outcome.state,
                    "step": outcome.step,
                    "out": storage.uri,
                    "metrics": metrics,
                    **error,
                }
            )
        )
        return
    if done:
        shown = ", ".join(
            f"{name} {metrics[name]:.4f}"
            for name in ("bbox/AP", "segm/AP", "keypoints/AP")
            if name in metrics
        )
        print(f"done: {shown}; {storage.uri}/{RESULT_FILE}")
    elif outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
    else:
        print(f"{outcome.state} at step {outcome.step}; the same command resumes it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
