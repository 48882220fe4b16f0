"""What a run over several nodes needs, checked on the nodes themselves.

A probe (`python -m workers.probe`) runs on each node, all at the same time. It is a Ray job that is
pinned to its node, so it has the surroundings that a trial has there. The probes print what they
learn, the service reads it in their logs, and `checks_of` turns it into lines.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence

from contract.answers import Check
from contract.attempt import PROBE_REPORT, PROBE_STORE, NodeReport, ProbePlan
from orchestrator.cluster.doctor_checks import Examination, checks_of
from orchestrator.cluster.jobs import ENDED, Cluster, UnreachableError
from orchestrator.cluster.nodes import Machine
from orchestrator.settings import ServiceSettings, service_files, storage_root

_MEET_S = 60.0  # how long a probe waits for the others
_START_S = 90.0  # for a job to print its first line: imports on a cold node take a while
_POLL_S = 0.3
_MAX_WORDS = 300  # characters of a dead probe's last line


def examine(
    cluster: Cluster, settings: ServiceSettings, tracking_uri: str, tracking_error: str = ""
) -> list[Check]:
    """Sends a probe to every node and checks what they report.

    tracking_error: why MLflow does not let the service in.
    Raises UnreachableError if Ray does not answer.
    """
    machines, name = cluster.machines(), f"doctor-{secrets.token_hex(4)}"
    root, folder = storage_root(settings), f".{name}"
    storage_error = _write_own_file(root, folder)
    plans = [
        ProbePlan(
            index=index,
            nodes=len(machines),
            address=machine.address,
            storage=root,
            folder=folder,
            mlflow=tracking_uri,
            study_logins=settings.mlflow_login_file != "",
            patience_s=_MEET_S,
        )
        for index, machine in enumerate(machines)
    ]
    probes = _Probes(cluster, settings, name)
    begin = time.time()
    try:
        reports, failures = probes.run(machines, plans)
    finally:
        probes.end()
        _remove_files(root, folder)
    lag_s = 0.0
    if machines and machines[0].id in reports:
        # The first probe looked at its clock between `begin` and now. Any time in between is
        # explained by the wait, so only what lies outside counts.
        at = reports[machines[0].id].now
        lag_s = max(0.0, begin - at) + min(0.0, time.time() - at)
    examination = Examination(
        machines=machines,
        reports=reports,
        failures=failures,
        ray_version=cluster.version(),
        tracking_uri=tracking_uri,
        tracking_error=tracking_error,
        storage=root,
        storage_error=storage_error,
        service_lag_s=lag_s,
    )
    return checks_of(examination)


def _write_own_file(root: str, folder: str) -> str:
    """Writes the service's file among those of the probes (as number -1). The error, if any."""
    try:
        service_files(root).write(f"{folder}/-1", f"{folder} -1\n".encode() * 1000)
    except OSError as error:
        return " ".join(str(error).split())
    return ""


def _remove_files(root: str, folder: str) -> None:
    try:
        service_files(root).delete(folder)
    except OSError:
        return  # the storage is not writable, which a check says already


class _Probes:
    """The jobs of one examination."""

    def __init__(self, cluster: Cluster, settings: ServiceSettings, name: str) -> None:
        self._cluster = cluster
        self._settings = settings
        self._name = name
        self._jobs: dict[str, str] = {}  # machine -> submission id

    def run(
        self, machines: Sequence[Machine], plans: Sequence[ProbePlan]
    ) -> tuple[dict[str, NodeReport], dict[str, str]]:
        """The reports, and why there is none (in words), by the machine's id.

        The first probe opens the store where all meet. The others start once it has printed where.
        """
        reports: dict[str, NodeReport] = {}
        failures: dict[str, str] = {}
        if not machines:
            return reports, failures
        self._start(machines[0], plans[0])
        store = self._printed(machines[0], PROBE_STORE, _START_S)
        if store:
            for machine, plan in zip(machines[1:], plans[1:], strict=True):
                self._start(machine, plan.model_copy(update={"store": store}))
        # A probe waits for the others twice: before it compares anything, and before it ends.
        deadline = time.monotonic() + _START_S + 2 * _MEET_S
        for machine in machines if store else machines[:1]:
            text = self._printed(machine, PROBE_REPORT, max(1.0, deadline - time.monotonic()))
            if text:
                reports[machine.id] = NodeReport.model_validate_json(text)
            else:
                failures[machine.id] = self._last_words(machine)
        for machine in machines:
            if machine.id not in reports and machine.id not in failures:
                failures[machine.id] = "not asked: the first node's probe said nothing"
        return reports, failures

    def _start(self, machine: Machine, plan: ProbePlan) -> None:
        # a node of an older version knows no newer field
        asked = plan.model_dump_json(exclude_defaults=True)
        command = [self._settings.entry[0], "-m", "workers.probe", asked]
        name = f"{self._name}-{plan.index}"
        environment = {**self._settings.environment, "OMP_NUM_THREADS": "1"}
        # exec: the signal that ends the job must reach Python, and not a shell in front of it.
        self._cluster.submit(name, f"exec {shlex.join(command)}", environment, "", {}, machine.id)
        self._jobs[machine.id] = name

    def _printed(self, machine: Machine, key: str, wait_s: float) -> str:
        """The rest of the line that begins with `key`.

        Empty if the job ends or `wait_s` passes without such a line.
        """
        job, deadline = self._jobs[machine.id], time.monotonic() + wait_s
        while True:
            # The state before the log: a job that ends in between has its line in the log.
            known = self._cluster.jobs().get(job)
            over = known is None or known.state in ENDED or time.monotonic() > deadline
            for line in self._cluster.log(job).splitlines():
                if line.startswith(f"{key} "):
                    return line.removeprefix(f"{key} ")
            if over:
                return ""
            time.sleep(_POLL_S)

    def _last_words(self, machine: Machine) -> str:
        job = self._jobs[machine.id]
        known = self._cluster.jobs().get(job)
        lines = [line.strip() for line in self._cluster.log(job).splitlines() if line.strip()]
        words = lines[-1] if lines else known.message if known else ""
        state = known.state if known else "gone"
        return f"its probe is {state}{f': {words[:_MAX_WORDS]}' if words else ' and said nothing'}"

    def end(self) -> None:
        """Ends what still runs and takes all of it out of Ray's memory."""
        for job in self._jobs.values():
            try:
                known = self._cluster.jobs().get(job)
                if known is not None and known.state not in ENDED:
                    self._cluster.stop(job)
                else:
                    self._cluster.forget(job)
            except UnreachableError:
                continue  # the checks are worth more than the tidying
