"""`python -m workers.ray_entry --spec FILE_OR_URI`: the entrypoint of a Ray job, one attempt.

It tries once: the retry budget is the service's. How it went is in `outcome.json` and in the exit
status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from contract.attempt import (
    ATTEMPT_STOP_FILE,
    LOG_FILE,
    NODES_FILE,
    OUTCOME_FILE,
    PREEMPT_FILE,
    RESULT_FILE,
    Outcome,
    RunSpec,
)
from contract.command import run_command
from contract.files import Files, split
from contract.machine.folders import own_name
from contract.machine.proxies import ask_this_machine_directly
from contract.words import one_line
from workers.trial.causes import (
    causes_in_logs,
    exit_status,
    most_telling,
    recorded_causes,
    write_outcome,
)
from workers.trial.stop import Reason, StopRequest, late_outcome

# Ray Train reads these when it is imported.
_RAY_SETTINGS = {
    # between two looks at the ranks; the default costs a trial 5 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # without it a trial for which resources are missing retries its placement group for ever
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_LOG_UPLOAD_S = 10.0  # between two uploads of a rank's log to a remote folder
_MOST_ERROR_CHARS = 1000


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workers.ray_entry", description="Runs one attempt of a trial."
    )
    parser.add_argument("--spec", required=True, metavar="FILE_OR_URI", help="a RunSpec as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(lambda: run_spec(read_spec(parser.parse_args(argv).spec)), argv)


def read_spec(where: str) -> RunSpec:
    """Raises ValueError if there is no readable spec."""
    folder, name = split(where)
    try:
        return RunSpec.model_validate_json(Files(folder).read(name))
    except FileNotFoundError:
        raise ValueError(f"--spec {where}: no such file") from None


def run_spec(spec: RunSpec) -> int:
    """Runs the attempt on Ray and returns its exit status."""
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)  # an operator may have set another value
    storage, asked = Files(spec.storage), StopRequest()
    storage.path()  # raises for a URI that nothing opens, before a gang is started for it
    failures: list[str] = []
    connected = threading.Event()
    # In a thread of its own: in the main thread Ray answers SIGINT by aborting all ranks within
    # 5 s, too soon for a checkpoint.
    thread = threading.Thread(
        target=lambda: failures.extend(_fit(spec, connected)), name="ray-train", daemon=True
    )
    with _signals_forwarded(storage, spec, asked) as take_signals:
        thread.start()
        while thread.is_alive() and not asked.reason:
            thread.join(0.2)
            if connected.is_set():
                take_signals()
                connected.clear()
        thread.join(spec.grace_s if asked.reason else None)
    if thread.is_alive():  # the last checkpoint stands; leaving ends the ranks
        late = late_outcome(asked.reason, spec.grace_s)
        write_outcome(storage, spec.attempt, late)
        print(f"{late.state}: {late.error}", flush=True)
        return exit_status(late)
    return conclude(spec, storage, failures)


def _fit(spec: RunSpec, connected: threading.Event) -> list[str]:
    """Trains to the end. Returns how ranks or Ray itself failed, nothing if they did not.

    connected: set once Ray is there. By then its core has replaced our handler of SIGTERM with its
    own, which aborts.
    """
    import ray

    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            logging_level="warning",
        )
        connected.set()
        return _fit_alone(spec) if spec.ranks == 1 else _fit_gang(spec)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        return [_last_line(error)]
    finally:
        ray.shutdown()


def _fit_alone(spec: RunSpec) -> list[str]:
    """One rank, as a task on resources of its own.

    It has no peers to meet, so it needs neither Ray Train nor its controller: two processes that
    import torch, and with it half of a trial's time to its first step.
    """
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources, elsewhere = _resources_of_a_rank(spec), _elsewhere(spec.avoid_nodes)
    # A group, as Ray Train makes one for a gang: the service counts what groups hold.
    group = placement_group([resources], bundle_label_selector=[elsewhere] if elsewhere else None)
    patience_s = float(os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"])
    if not group.wait(patience_s):
        needs = ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
        beside = f" beside {len(spec.avoid_nodes)} that it avoids" if spec.avoid_nodes else ""
        return [f"no node{beside} has had {needs} free for {patience_s:.0f} s"]
    task = ray.remote(train_rank).options(
        num_cpus=spec.cpus_per_rank,
        num_gpus=spec.gpus_per_rank,
        resources=spec.rank_resources,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        max_retries=0,  # the ledger counts them for good
    )
    try:
        ray.get(task.remote({"spec": spec.model_dump_json()}))
    except ray.exceptions.OutOfMemoryError as error:
        return [f"rank 0: {one_line(error)}"]  # what comes below is advice for Ray's operator
    except ray.exceptions.RayError as error:
        return [f"rank 0: {_last_line(error)}"]
    return []


def _fit_gang(spec: RunSpec) -> list[str]:
    """Several ranks, by Ray Train: it places them together and makes their process group."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    from workers.training.world import TIMEOUTS

    backend = "nccl" if spec.gpus_per_rank else "gloo"
    try:
        TorchTrainer(
            train_rank,
            train_loop_config={"spec": spec.model_dump_json()},
            torch_config=TorchConfig(
                backend=backend, timeout_s=round(TIMEOUTS[backend].total_seconds())
            ),
            scaling_config=ScalingConfig(
                num_workers=spec.ranks,
                use_gpu=bool(spec.gpus_per_rank),
                resources_per_worker=_resources_of_a_rank(spec),
                placement_strategy="STRICT_PACK" if spec.max_nodes == 1 else "PACK",
                label_selector=_elsewhere(spec.avoid_nodes),
            ),
            run_config=RunConfig(
                name=f"ray-{spec.attempt}",
                storage_path=spec.storage,
                # no retries here: Ray counts them in memory, the ledger counts them for good
                failure_config=FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        ).fit()
    except WorkerGroupError as error:
        return [
            f"rank {rank}: {_last_line(failure)}"
            for rank, failure in sorted(error.worker_failures.items())
        ]
    except TrainingFailedError as error:
        return [_last_line(error)]
    return []


def _resources_of_a_rank(spec: RunSpec) -> dict[str, float]:
    """In Ray's names."""
    resources = {"CPU": spec.cpus_per_rank, **spec.rank_resources}
    if spec.gpus_per_rank:
        resources["GPU"] = spec.gpus_per_rank
    return resources


def _elsewhere(avoid: Sequence[str]) -> dict[str, str] | None:
    """Ray's label selector for any node but these."""
    return {"ray.io/node-id": f"!in({','.join(avoid)})"} if avoid else None


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__)[:_MOST_ERROR_CHARS]


# --- on a rank ---


def train_rank(config: dict[str, str]) -> None:
    """Ray calls this in the process of every rank; one rank alone has no process group.

    Raises if the attempt failed, so that Ray ends the other ranks.
    """
    ask_this_machine_directly()  # no `run_command` started this process
    spec = RunSpec.model_validate_json(config["spec"])
    storage = Files(spec.storage)
    rank = int(os.environ["RANK"]) if spec.ranks > 1 else 0
    with logged_to(storage, LOG_FILE.format(attempt=spec.attempt, rank=rank)):
        # inside, so that the log holds what goes wrong in these imports, too
        from workers.tracking.console import progress_shower, show_nothing
        from workers.tracking.spool import print_warning
        from workers.training.run import run_trial
        from workers.training.world import host_name, join_world, world_alone
        from workers.trial.stop import files_asking

        world = join_world() if spec.ranks > 1 else world_alone(spec.gpus_per_rank)
        print(
            f"rank {world.rank} of {world.size}, process {os.getpid()}, node {host_name()}",
            flush=True,
        )
        stop = StopRequest()
        # the service reads them: a retry avoids the nodes of a lost attempt
        nodes = world.gather(_node_id())
        if world.is_first:
            storage.write_json(NODES_FILE.format(attempt=spec.attempt), nodes)
        watched = (
            files_asking(stop, storage, spec.attempt, lambda: _draining(nodes), print_warning)
            if world.is_first
            else contextlib.nullcontext()
        )
        with watched:
            outcome = run_trial(
                spec, world, stop, progress_shower() if world.is_first else show_nothing
            )
    if outcome.state == "failed":
        raise RuntimeError(outcome.error)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _draining(nodes: Sequence[str]) -> bool:
    """Whether Ray says that one of the nodes is about to go away.

    Raises RuntimeError if Ray does not answer.
    """
    from ray._private.state import state
    from ray.exceptions import RayError

    try:
        return not state.get_draining_nodes().keys().isdisjoint(nodes)
    except RayError as error:
        raise RuntimeError(f"Ray does not say which nodes are draining: {error}") from error


@contextlib.contextmanager
def logged_to(storage: Files, path: str) -> Iterator[None]:
    """Within the block everything that this process prints goes to a file of the trial.

    If the trial's folder is remote, a thread uploads the file now and then.
    """
    if storage.local is not None:
        file = storage.local / path
        file.parent.mkdir(parents=True, exist_ok=True)
    else:
        file = Path(tempfile.mkdtemp(prefix=f"{own_name('log')}-")) / "rank.log"
    # the descriptors themselves: libraries in C write to them, past `sys.stdout`
    kept = [os.dup(1), os.dup(2)]
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    ended = threading.Event()
    follower = threading.Thread(target=_upload_log, args=(storage, file, path, ended), daemon=True)
    if storage.local is None:
        follower.start()
    try:
        yield
    finally:
        _flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        ended.set()
        if follower.is_alive():
            follower.join()


def _upload_log(storage: Files, file: Path, path: str, ended: threading.Event) -> None:
    last = -1
    while True:
        over = ended.wait(_LOG_UPLOAD_S)
        size = file.stat().st_size
        if size != last:
            # an upload that fails leaves `last` as it is, and the next round tries again
            with contextlib.suppress(OSError, RuntimeError):
                storage.write(path, file.read_bytes())
                last = size
        if over:
            return


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# --- in the driver ---


@contextlib.contextmanager
def _signals_forwarded(
    storage: Files, spec: RunSpec, asked: StopRequest
) -> Iterator[Callable[[], None]]:
    """Within the block a signal to this process becomes a file that rank 0 looks for.

    SIGINT asks for a stop, SIGTERM for preemption. The block gets a function that installs the
    handlers again, after Ray has replaced them.
    """

    def forward(path: str, reason: Reason) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, _: FrameType | None) -> None:
            storage.write(path, str(number).encode())
            asked.ask(reason)

        return handle

    handlers = {
        signal.SIGINT: forward(ATTEMPT_STOP_FILE.format(attempt=spec.attempt), "stopped"),
        signal.SIGTERM: forward(PREEMPT_FILE.format(attempt=spec.attempt), "preempted"),
    }

    def take() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in handlers}
    take()
    try:
        yield take
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def conclude(spec: RunSpec, storage: Files, failures: Sequence[str]) -> int:
    """Writes the attempt's outcome, also to the tracker, and returns the exit status.

    Rank 0 left the outcome. If it died, the causes of the other ranks and Ray's words make one.
    """
    path = OUTCOME_FILE.format(attempt=spec.attempt)
    outcome = Outcome.model_validate_json(storage.read(path)) if storage.exists(path) else None
    causes = recorded_causes(storage, spec.attempt)
    failed = outcome is None or outcome.state == "failed"
    silent = {*range(spec.ranks)} - {cause.rank for cause in causes}
    in_logs = causes_in_logs(storage, spec.attempt, sorted(silent)) if failed else []
    causes += in_logs
    # a rank may know better than rank 0 why the collective broke
    if causes and failed:
        cause = most_telling(causes)
        if outcome is None or outcome.error_class in ("collective", "unknown"):
            outcome = Outcome(
                state="failed",
                error_class=cause.error_class,
                error=f"rank {cause.rank}: {cause.error}",
                rank=cause.rank,
                avoid_node=cause.gpu_broke,
            )
    # a rank that left no cause was killed: Ray's words name it, its peers only lost it
    killed = failures and not in_logs
    if outcome is None or (killed and outcome.error_class == "collective"):
        failure = "; ".join(failures) or "the ranks ended without an outcome"
        outcome = Outcome(state="failed", error_class="node", error=f"Ray: {failure}")
    write_outcome(storage, spec.attempt, outcome)
    if outcome.state == "failed":
        from workers.tracking.journal import track_failure

        track_failure(spec, storage, outcome)
        print(f"error: {outcome.error}", file=sys.stderr, flush=True)
    else:
        result = f"; {spec.storage}/{RESULT_FILE}" if outcome.state == "done" else ""
        print(f"{outcome.state} at step {outcome.step}{result}", flush=True)
    return exit_status(outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
