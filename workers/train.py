"""`python -m workers.train RUN.yaml`: one run without Ray, under torchrun on several ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from contract.attempt import (
    RESULT_FILE,
    SPEC_FILE,
    STOP_FILE,
    MLflowTracking,
    NoTracking,
    Outcome,
    Progress,
    Result,
    RunSpec,
)
from contract.command import add_output_options, run_command
from contract.files import Files, uri_join
from contract.recipe import RunConfig, apply_overrides, parse_run
from contract.record import Message
from contract.run_file import parse_overrides, read_run_file

_SHOWN = ("bbox/AP", "segm/AP", "keypoints/AP")  # of the metrics, to a person


def main(argv: Sequence[str]) -> int:
    return run_command(lambda: _train(_parser().parse_args(argv)), argv)


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
        help="from a stop request to the end by force, if no checkpoint was reached "
        "(default: %(default)s)",
    )
    add_output_options(parser)
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

    run = _checked(arguments)
    out = arguments.out or f"runs/{Path(arguments.run).stem}"
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_asking(stop))
        if arguments.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        world = stack.enter_context(launched_world(os.environ))
        storage = Files(out)
        storage.path()  # on every rank: a URI that nothing opens must leave no rank waiting
        # only a request that is older than this command may be for the run that it resumes
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
            storage.write_json(SPEC_FILE.format(attempt=attempt), spec.sparse())
            show = progress_shower()
            if world.device.type == "cpu":
                print(f"{spec.cpus_per_rank:.0f} thread(s) a rank (--cpus-per-rank)", flush=True)

        def claimed() -> None:
            # not before: until the folder is ours, the request may be for a run that lives in it
            if old_request:
                storage.delete(STOP_FILE)
            stack.enter_context(files_asking(stop, storage, attempt, lambda: False, print))

        def leave(reason: Reason) -> None:
            late = late_outcome(reason, spec.grace_s)
            if world.is_first:
                write_outcome(storage, attempt, late)
            print(f"{late.state}: {late.error}", file=sys.stderr, flush=True)
            # not sys.exit: the main thread hangs, and this is another one
            os._exit(exit_status(late))

        stack.enter_context(grace_enforced(stop, spec.grace_s, leave))
        outcome = run_trial(spec, world, stop, show, claimed)
    if world.is_first:
        _report(outcome, storage, run, arguments.json)
    return exit_status(outcome)


def _checked(arguments: argparse.Namespace) -> RunConfig:
    """The run that the arguments ask for. Raises ValueError of one line."""
    if arguments.cpus_per_rank < 0:
        raise ValueError(
            f"--cpus-per-rank {arguments.cpus_per_rank}: give 1 or more, or leave it out"
        )
    if not arguments.grace_s > 0:  # so that nan is refused, too
        raise ValueError(f"--grace-s {arguments.grace_s:g}: give more than 0 seconds")
    return read_run(Path(arguments.run), arguments.set)


def read_run(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The run of a file with `PATH=VALUE` overrides.

    Raises ValueError or FileNotFoundError of one line.
    """
    data = apply_overrides(read_run_file(path), parse_overrides(overrides))
    return parse_run(data, str(path))


def share_of_cores(environment: Mapping[str, str]) -> int:
    """The cores of this process, divided by the ranks that torchrun started on this machine.

    Ranks with more threads than cores are far slower: OpenMP threads spin at barriers.
    """
    # the cores that it may use, which in a container are fewer than the machine has
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(cores // int(environment.get("LOCAL_WORLD_SIZE", "1")), 1)


class _SpecTrial(Message):
    """What `next_attempt` reads of a RunSpec, which another version may have written."""

    trial: str = ""


def next_attempt(storage: Files) -> tuple[int, str]:
    """The number of this folder's next attempt, and the trial's id.

    The number is one more than that of the last attempt, even of one that was refused. The tracker
    knows the trial by its id, so two folders of one name have two.
    """
    from workers.trial.checkpoints import claimed_attempt

    numbers = (int(name) for name in storage.names("attempts") if name.isdecimal())
    last = max([claimed_attempt(storage), *numbers])
    name = storage.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    for attempt in range(last, 0, -1):
        spec = SPEC_FILE.format(attempt=attempt)
        if storage.exists(spec):
            known = _SpecTrial.model_validate_json(storage.read(spec)).trial
            if known:
                return last + 1, known
    return last + 1, f"{name}-{uuid4().hex[:8]}"


def _report(outcome: Outcome, storage: Files, run: RunConfig, as_json: bool) -> None:
    from workers.training.evaluate import best_metric

    metrics: dict[str, float] = {}
    weights: dict[str, str] = {}
    if outcome.state == "done":
        result = Result.model_validate_json(storage.read(RESULT_FILE))
        metrics = result.metrics
        named = {"last": "weights/last", "best": "weights/best"}
        paths = {name: result.artifacts.get(key) for name, key in named.items()}
        weights = {name: uri_join(storage.uri, path) for name, path in paths.items() if path}
    if as_json:
        answer: dict[str, object] = {
            "state": outcome.state,
            "step": outcome.step,
            "out": storage.uri,
            "weights": weights,
        }
        error = {"error": outcome.error} if outcome.error else {}
        print(json.dumps({**answer, "metrics": metrics, **error}))
    elif outcome.state == "done":
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in _SHOWN if name in metrics)
        print(f"done: {shown}; {uri_join(storage.uri, RESULT_FILE)}")
        for name, path in weights.items():
            words = f"best weights, by {best_metric(run)}" if name == "best" else "last weights"
            print(f"{words}: {path}")
    elif outcome.error:
        print(f"error: {outcome.error}", file=sys.stderr)
    else:
        print(f"{outcome.state} at step {outcome.step}; the same command resumes it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
