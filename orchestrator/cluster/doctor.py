"""What a run over several nodes needs, checked on the nodes themselves: one probe on each, all at the same time.

A probe (`python -m workers.probe`) is a Ray job that is pinned to its node, so it lives in the surroundings that trials
will. What the probes say is read from their logs; `judge` makes lines of it, each of which passes or says the remedy.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contract.answers import Check
from contract.probe import PROBE_REPORT, PROBE_STORE, NodeReport, ProbePlan
from orchestrator.cluster.jobs import ENDED, Cluster, UnreachableError
from orchestrator.cluster.nodes import Machine
from orchestrator.settings import ServiceSettings, service_files, storage_root

PATIENCE_S = 60.0  # of the probes with each other
_START_S = 90.0  # for a job to say its first word: imports on a cold node take a while
MAX_CLOCK_S = 2.0  # the lease and the events of several hosts are in the same ledger
MIN_DISK_GIB, MIN_SHM_GIB = 10.0, 1.0


@dataclass(frozen=True)
class Seen:
    """What an examination brought. `reports` and `failures` (in words) by the machine's id; one of them each."""

    machines: Sequence[Machine]
    reports: Mapping[str, NodeReport]
    failures: Mapping[str, str]
    ray_version: str
    tracking_uri: str
    storage: str
    storage_error: str  # of the service itself
    service_lag_s: (
        float  # the service's clock minus the first node's, less what the journey can explain
    )


def examine(cluster: Cluster, settings: ServiceSettings, tracking_uri: str) -> list[Check]:
    """Sends a probe to every node and judges what they say. Raises UnreachableError if Ray does not answer."""
    machines, name = cluster.machines(), f"doctor-{secrets.token_hex(4)}"
    root, folder = storage_root(settings), f".{name}"
    storage_error = ""
    try:
        service_files(root).write(f"{folder}/-1", f"{folder} -1\n".encode() * 1000)
    except OSError as error:
        storage_error = " ".join(str(error).split())
    plans = [
        ProbePlan(
            index=index,
            nodes=len(machines),
            address=machine.address,
            storage=root,
            folder=folder,
            mlflow=tracking_uri,
            patience_s=PATIENCE_S,
        )
        for index, machine in enumerate(machines)
    ]
    round_ = _Round(cluster, settings, name)
    begin = time.time()
    try:
        reports, failures = round_.run(machines, plans)
    finally:
        round_.end()
        _tidy(root, folder)
    first = reports.get(machines[0].id) if machines else None
    lag = 0.0 if first is None else max(0.0, begin - first.now) + min(0.0, time.time() - first.now)
    version = cluster.version()
    return judge(Seen(machines, reports, failures, version, tracking_uri, root, storage_error, lag))


def _tidy(root: str, folder: str) -> None:
    try:
        service_files(root).delete(folder)
    except OSError:
        return  # it was not writable: that is said already


class _Round:
    """The jobs of one examination."""

    def __init__(self, cluster: Cluster, settings: ServiceSettings, name: str) -> None:
        self._cluster = cluster
        self._settings = settings
        self._name = name
        self._jobs: dict[str, str] = {}  # machine -> submission id

    def run(
        self, machines: Sequence[Machine], plans: Sequence[ProbePlan]
    ) -> tuple[dict[str, NodeReport], dict[str, str]]:
        """The first probe opens the store where the others meet: they start once it has said where."""
        if not machines:
            return {}, {}
        self._start(machines[0], plans[0])
        store = self._word(machines[0], PROBE_STORE, _START_S)
        reports: dict[str, NodeReport] = {}
        failures: dict[str, str] = {}
        if store:
            for machine, plan in zip(machines[1:], plans[1:], strict=True):
                self._start(machine, plan.model_copy(update={"store": store}))
        deadline = time.monotonic() + _START_S + 2 * PATIENCE_S
        for machine in machines if store else machines[:1]:
            text = self._word(machine, PROBE_REPORT, max(1.0, deadline - time.monotonic()))
            if text:
                reports[machine.id] = NodeReport.model_validate_json(text)
            else:
                failures[machine.id] = self._last_words(machine)
        for machine in machines:
            if machine.id not in reports and machine.id not in failures:
                failures[machine.id] = "not asked: the first node's probe said nothing"
        return reports, failures

    def _start(self, machine: Machine, plan: ProbePlan) -> None:
        command = [self._settings.entry[0], "-m", "workers.probe", plan.model_dump_json()]
        name = f"{self._name}-{plan.index}"
        environment = {**self._settings.environment, "OMP_NUM_THREADS": "1"}
        self._cluster.submit(name, f"exec {shlex.join(command)}", environment, "", {}, machine.id)
        self._jobs[machine.id] = name

    def _word(self, machine: Machine, key: str, wait_s: float) -> str:
        """The rest of the line that begins with `key`; empty if the job ends or `wait_s` passes without it."""
        job, deadline = self._jobs[machine.id], time.monotonic() + wait_s
        while True:
            known = self._cluster.jobs().get(job)
            over = known is None or known.state in ENDED or time.monotonic() > deadline
            for line in self._cluster.log(job).splitlines():
                if line.startswith(f"{key} "):
                    return line.removeprefix(f"{key} ")
            if over:
                return ""
            time.sleep(0.3)

    def _last_words(self, machine: Machine) -> str:
        job = self._jobs[machine.id]
        known = self._cluster.jobs().get(job)
        lines = [line.strip() for line in self._cluster.log(job).splitlines() if line.strip()]
        said = lines[-1][:300] if lines else (known.message[:300] if known else "")
        return f"its probe is {known.state if known else 'gone'}{f': {said}' if said else ' and said nothing'}"

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
                continue


# --- judging --------------------------------------------------------------------------------------------------------


def judge(seen: Seen) -> list[Check]:
    """One line a check, over all nodes; a node that said nothing fails the first of them."""
    if not seen.machines:
        return [
            Check(
                name="nodes",
                ok=False,
                found="the cluster has no node",
                remedy="start some with `ray start`",
            )
        ]
    nodes = {machine.id: _name(machine, seen) for machine in seen.machines}
    reports = {
        nodes[machine.id]: seen.reports[machine.id]
        for machine in seen.machines
        if machine.id in seen.reports
    }
    silent = [f"{nodes[node]}: {why}" for node, why in seen.failures.items()]
    checks = [
        _check(
            "nodes",
            f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {', '.join(nodes.values())}",
            silent,
            "see that maskray is installed there under the same path and that the node has memory to start a job",
        )
    ]
    if not reports:
        return checks
    by_index = {report.index: name for name, report in reports.items()}
    return [
        *checks,
        _ray(seen, reports),
        _versions(reports),
        _drivers(reports),
        _same(
            "code", "installed sources", {name: report.sources[:12] for name, report in reports.items()},
            "install the same version of maskray on every node (studies from a git tree bring their own code)",
        ),
        _meeting(reports),
        _links(reports, by_index),
        _storage(seen, reports),
        _clocks(seen, reports),
        _check(
            "disk",
            f"at least {min(r.disk_free_gib for r in reports.values()):.0f} GiB free in the temporary folder",
            [f"{n}: {r.disk_free_gib:.1f} GiB free" for n, r in reports.items() if r.disk_free_gib < MIN_DISK_GIB],
            f"free some: Ray's logs and cached shards need {MIN_DISK_GIB:.0f} GiB there, or set TMPDIR elsewhere",
        ),
        _check(
            "memory",
            f"at least {min(r.shm_free_gib for r in reports.values()):.1f} GiB of shared memory free",
            [f"{n}: {r.shm_free_gib:.2f} GiB free" for n, r in reports.items() if r.shm_free_gib < MIN_SHM_GIB],
            "give the container more (--shm-size=8g, or an emptyDir with medium: Memory at /dev/shm)",
        ),
        _mlflow(seen, reports),
    ]  # fmt: skip


def _name(machine: Machine, seen: Seen) -> str:
    report = seen.reports.get(machine.id)
    return f"{report.host if report else machine.address}/{machine.id[:6]}"


def _check(name: str, good: str, wrong: Sequence[str], remedy: str) -> Check:
    return Check(
        name=name, ok=not wrong, found="; ".join(wrong) or good, remedy=remedy if wrong else ""
    )


def _same(name: str, what: str, values: Mapping[str, str], remedy: str) -> Check:
    groups: dict[str, list[str]] = {}
    for node, value in values.items():
        groups.setdefault(value, []).append(node)
    wrong = (
        [f"{value} on {', '.join(who)}" for value, who in groups.items()] if len(groups) > 1 else []
    )
    return _check(name, f"{what} {next(iter(groups))} everywhere", wrong, remedy)


def _ray(seen: Seen, reports: Mapping[str, NodeReport]) -> Check:
    versions = {
        "the head": seen.ray_version,
        **{name: report.versions["ray"] for name, report in reports.items()},
    }
    return _same("ray", "version", versions, "install the head's version of Ray on every node")


def _versions(reports: Mapping[str, NodeReport]) -> Check:
    wrong = []
    packages = [name for name in next(iter(reports.values())).versions if name != "ray"]
    for package in packages:
        found = {name: report.versions.get(package, "absent") for name, report in reports.items()}
        if len(set(found.values())) > 1:
            wrong.append(
                f"{package}: " + ", ".join(f"{value} on {name}" for name, value in found.items())
            )
    shown = next(iter(reports.values())).versions
    good = f"python {shown['python']}, torch {shown['torch']}, numpy {shown['numpy']} everywhere"
    return _check("versions", good, wrong, "install from constraints.txt on every node")


def _drivers(reports: Mapping[str, NodeReport]) -> Check:
    found = {name: report.gpu_driver for name, report in reports.items() if report.gpu_driver}
    if not found:
        return _check("drivers", "no GPUs on any node", [], "")
    broken = [f"{name}: {text}" for name, text in found.items() if not text.startswith("NVIDIA")]
    if broken:
        return _check(
            "drivers",
            "",
            broken,
            "install or restart the driver there; `nvidia-smi` must list the devices",
        )
    versions = {name: text.partition(",")[0] for name, text in found.items()}
    return _same(
        "drivers", "driver", versions, "install the same NVIDIA driver on every node with GPUs"
    )


def _meeting(reports: Mapping[str, NodeReport]) -> Check:
    wrong = [
        f"{name}: {report.meeting_error}"
        for name, report in reports.items()
        if report.meeting_error
    ]
    return _check(
        "meeting", "all nodes reach the first one", wrong, "open TCP between all nodes, all ports"
    )


def _links(reports: Mapping[str, NodeReport], by_index: Mapping[int, str]) -> Check:
    """Each pair is told by both of its nodes; what one of them saw fail has failed."""
    wrong, speeds, interfaces = [], [], set()
    for name, report in reports.items():
        for link in report.links:
            other = by_index.get(link.peer, f"node {link.peer}")
            if link.error:
                wrong.append(f"{name} with {other}: {link.error}")
            else:
                speeds.append(link.mib_per_s)
                interfaces.add(link.interface or link.address)
    if not speeds and not wrong:
        return _check("all-reduce", "one node: no pair to try", [], "")
    good = f"{len(speeds) // 2} pairs over {', '.join(sorted(interfaces))}, " + (
        f"{min(speeds):.0f} to {max(speeds):.0f} MiB/s (gloo, 4 MiB)" if speeds else ""
    )
    remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (service setting `environment`) to the right interface"
    return _check("all-reduce", good, wrong, remedy)


def _storage(seen: Seen, reports: Mapping[str, NodeReport]) -> Check:
    wrong = [
        f"{name}: {report.storage_error}"
        for name, report in reports.items()
        if report.storage_error
    ]
    wrong += [f"the service: {seen.storage_error}"] if seen.storage_error else []
    good = f"{seen.storage} is written and read alike from everywhere"
    return _check(
        "storage",
        good,
        wrong,
        f"mount {seen.storage} on every node and the service's host, or use s3://",
    )


def _clocks(seen: Seen, reports: Mapping[str, NodeReport]) -> Check:
    wrong, largest = [], 0.0
    for name, report in reports.items():
        if report.clock is None:
            wrong += [f"{name}: not compared"] if report.index and not report.meeting_error else []
            continue
        largest = max(largest, abs(report.clock.offset_s))
        if abs(report.clock.offset_s) - report.clock.uncertainty_s > MAX_CLOCK_S:
            wrong.append(f"{name}: {report.clock.offset_s:+.1f} s behind the first node")
    if abs(seen.service_lag_s) > MAX_CLOCK_S:
        wrong.append(f"the service: {seen.service_lag_s:+.1f} s ahead of the first node")
    return _check(
        "clocks", f"within {largest:.3f} s of each other", wrong, "run chrony or ntpd on every host"
    )


def _mlflow(seen: Seen, reports: Mapping[str, NodeReport]) -> Check:
    if not seen.tracking_uri:
        return _check("mlflow", "the service runs without one", [], "")
    wrong = [
        f"{name}: {report.mlflow_error}" for name, report in reports.items() if report.mlflow_error
    ]
    return _check(
        "mlflow",
        f"{seen.tracking_uri} answers every node",
        wrong,
        "start it, or open its port to the nodes",
    )
