"""What the probes of an examination say, as lines that pass or name the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from contract.answers import Check
from contract.attempt import GpuReport, NodeReport
from contract.machine.logins import authorization
from orchestrator.cluster.nodes import Machine

MAX_CLOCK_S = 2.0  # the lease and the events of several hosts are in the same ledger
MIN_DISK_GIB, MIN_SHM_GIB = 10.0, 1.0


@dataclass(frozen=True)
class Examination:
    """What the probes brought. A machine's id is in `reports` or in `failures` (in words)."""

    machines: Sequence[Machine]
    reports: Mapping[str, NodeReport]
    failures: Mapping[str, str]
    ray_version: str
    tracking_uri: str
    tracking_error: str  # of the service itself
    storage: str
    storage_error: str  # of the service itself
    # The service's clock minus the first node's, less what the time on the way can explain.
    service_lag_s: float


def checks_of(examination: Examination) -> list[Check]:
    """One line a check, over all nodes. A silent node fails the first line alone."""
    if not examination.machines:
        return [_check("nodes", "", ["the cluster has no node"], "start some with `ray start`")]
    nodes = {machine.id: _name(machine, examination) for machine in examination.machines}
    reports = {nodes[machine]: report for machine, report in examination.reports.items()}
    silent = [f"{nodes[machine]}: {why}" for machine, why in examination.failures.items()]
    first = _check(
        "nodes",
        f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {', '.join(nodes.values())}",
        silent,
        "see that maskray is installed there under the same path "
        "and that the node has memory to start a job",
    )
    if not reports:
        return [first]  # nothing is left to compare
    return [
        first,
        _ray(examination, reports),
        _versions(reports),
        _drivers(reports),
        *_gpus(reports),
        _code(reports),
        _meeting(reports),
        _links(reports),
        _storage(examination, reports),
        _clocks(examination, reports),
        _disk(reports),
        _memory(reports),
        _mlflow(examination, reports),
    ]


def _name(machine: Machine, examination: Examination) -> str:
    report = examination.reports.get(machine.id)
    return f"{report.host if report else machine.address}/{machine.id[:6]}"


def _check(name: str, good: str, wrong: Sequence[str], remedy: str) -> Check:
    text = "; ".join(wrong) or good
    return Check(name=name, ok=not wrong, found=text, remedy=remedy if wrong else "")


def _problems(reports: Mapping[str, NodeReport], problem: Callable[[NodeReport], str]) -> list[str]:
    """The nodes that have a problem, each with its words."""
    return [f"{name}: {text}" for name, report in reports.items() if (text := problem(report))]


def _same(name: str, what: str, values: Mapping[str, str], remedy: str) -> Check:
    """Passes if `values` has one value for all nodes."""
    nodes_by_value: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes_by_value.setdefault(value, []).append(node)
    wrong = [f"{value} on {', '.join(nodes)}" for value, nodes in nodes_by_value.items()]
    good = f"{what} {next(iter(nodes_by_value))} everywhere"
    return _check(name, good, wrong if len(wrong) > 1 else [], remedy)


def _ray(examination: Examination, reports: Mapping[str, NodeReport]) -> Check:
    versions = {name: report.versions["ray"] for name, report in reports.items()}
    versions = {"the head": examination.ray_version, **versions}
    return _same("ray", "version", versions, "install the head's version of Ray on every node")


def _versions(reports: Mapping[str, NodeReport]) -> Check:
    shown = next(iter(reports.values())).versions
    wrong = []
    for package in shown:
        if package == "ray":  # a line of its own, which names the head too
            continue
        versions = {
            name: report.versions.get(package, "absent") for name, report in reports.items()
        }
        if len(set(versions.values())) > 1:
            nodes = ", ".join(f"{version} on {name}" for name, version in versions.items())
            wrong.append(f"{package}: {nodes}")
    good = ", ".join(f"{package} {shown[package]}" for package in ("python", "torch", "numpy"))
    remedy = "install from constraints.txt on every node"
    return _check("versions", f"{good} everywhere", wrong, remedy)


def _drivers(reports: Mapping[str, NodeReport]) -> Check:
    texts = {name: report.gpu_driver for name, report in reports.items() if report.gpu_driver}
    if not texts:
        return _check("drivers", "no GPUs on any node", [], "")
    # Instead of a driver's version a node reports why it could not learn it.
    broken = [f"{name}: {text}" for name, text in texts.items() if not text.startswith("NVIDIA")]
    if broken:
        remedy = "install or restart the driver there; `nvidia-smi` must list the devices"
        return _check("drivers", "", broken, remedy)
    versions = {name: text.partition(",")[0] for name, text in texts.items()}
    remedy = "install the same NVIDIA driver on every node with GPUs"
    return _same("drivers", "driver", versions, remedy)


def _gpus(reports: Mapping[str, NodeReport]) -> list[Check]:
    """Two lines, none for a cluster without GPUs or with an older version of maskray on it."""
    gpus = {name: report.gpu for name, report in reports.items() if report.gpu is not None}
    if not gpus:
        return []
    return [_precision(gpus), _kernels(gpus)]


def _precision(gpus: Mapping[str, GpuReport]) -> Check:
    """Fails if torch reaches no GPU somewhere, or if bf16 is refused on some of the nodes alone."""
    silent = [f"{name}: {gpu.error}" for name, gpu in gpus.items() if gpu.error]
    if silent:
        remedy = "install the CUDA build of torch that fits the driver (versions are above)"
        return _check("precision", "", silent, remedy)
    without = [f"{name}: {gpu.name}" for name, gpu in gpus.items() if "bf16" not in gpu.precisions]
    if without and len(without) < len(gpus):
        remedy = (
            "no trial with loop.precision bf16 runs there: choose fp16 or fp32, or give the other "
            "nodes a resource and ask for it in resources.custom_per_rank"
        )
        return _check("precision", "", [f"no bf16 on {text}" for text in without], remedy)
    kinds = dict.fromkeys(f"{gpu.name}: {', '.join(gpu.precisions)}" for gpu in gpus.values())
    emulated = "; bf16 would be emulated and is refused, choose fp16 or fp32" if without else ""
    return _check("precision", f"{'; '.join(kinds)}{emulated}", [], "")


def _kernels(gpus: Mapping[str, GpuReport]) -> Check:
    """Trials run without our kernels too, only slower."""
    wrong = [f"{name}: {text}" for name, gpu in gpus.items() for text in gpu.complaints]
    known = dict.fromkeys(gpu.kernels for gpu in gpus.values() if gpu.kernels)
    remedy = "install gcc, the headers of Python (python3-dev) and the Triton that torch asks for"
    return _check("kernels", ", ".join(known), wrong, remedy)


def _code(reports: Mapping[str, NodeReport]) -> Check:
    hashes = {name: report.sources[:12] for name, report in reports.items()}
    remedy = (
        "install the same version of maskray on every node "
        "(studies from a git tree bring their own code)"
    )
    return _same("code", "installed sources", hashes, remedy)


def _meeting(reports: Mapping[str, NodeReport]) -> Check:
    wrong = _problems(reports, lambda report: report.meeting_error)
    remedy = "open TCP between all nodes, all ports"
    return _check("meeting", "all nodes reach the first one", wrong, remedy)


def _links(reports: Mapping[str, NodeReport]) -> Check:
    """Both nodes of a pair report it, and a failure that one of them saw fails the pair."""
    names = {report.index: name for name, report in reports.items()}
    wrong, speeds, interfaces = [], [], set()
    for name, report in reports.items():
        for link in report.links:
            other = names.get(link.peer, f"node {link.peer}")
            if link.error:
                wrong.append(f"{name} with {other}: {link.error}")
            else:
                speeds.append(link.mib_per_s)
                interfaces.add(link.interface or link.address)
    if not speeds and not wrong:
        return _check("all-reduce", "one node: no pair to try", [], "")
    good = f"{len(speeds) // 2} pairs over {', '.join(sorted(interfaces))}, "
    if speeds:
        good += f"{min(speeds):.0f} to {max(speeds):.0f} MiB/s (gloo, 4 MiB)"
    remedy = (
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (service setting `environment`) "
        "to the right interface"
    )
    return _check("all-reduce", good, wrong, remedy)


def _storage(examination: Examination, reports: Mapping[str, NodeReport]) -> Check:
    uri = examination.storage
    wrong = _problems(reports, lambda report: report.storage_error)
    if examination.storage_error:
        wrong.append(f"the service: {examination.storage_error}")
    remedy = f"mount {uri} on every node and the service's host, or use s3://"
    return _check("storage", f"{uri} is written and read alike from everywhere", wrong, remedy)


def _clocks(examination: Examination, reports: Mapping[str, NodeReport]) -> Check:
    wrong, largest = [], 0.0
    for name, report in reports.items():
        if report.clock is None:
            # The first node has nobody to compare with; a node that met nobody says so elsewhere.
            wrong += [f"{name}: not compared"] if report.index and not report.meeting_error else []
            continue
        offset_s = report.clock.offset_s
        largest = max(largest, abs(offset_s))
        # A slow answer explains a part of the offset, so that part is no fault of the clock.
        if abs(offset_s) - report.clock.uncertainty_s > MAX_CLOCK_S:
            wrong.append(f"{name}: {offset_s:+.1f} s behind the first node")
    if abs(examination.service_lag_s) > MAX_CLOCK_S:
        lag_s = examination.service_lag_s
        wrong.append(f"the service: {lag_s:+.1f} s ahead of the first node")
    good = f"within {largest:.3f} s of each other"
    return _check("clocks", good, wrong, "run chrony or ntpd on every host")


def _disk(reports: Mapping[str, NodeReport]) -> Check:
    def problem(report: NodeReport) -> str:
        enough = report.disk_free_gib >= MIN_DISK_GIB
        return "" if enough else f"{report.disk_free_gib:.1f} GiB free"

    least = min(report.disk_free_gib for report in reports.values())
    good = f"at least {least:.0f} GiB free in the temporary folder"
    remedy = (
        f"free some: Ray's logs and cached shards need {MIN_DISK_GIB:.0f} GiB there, "
        "or set TMPDIR elsewhere"
    )
    return _check("disk", good, _problems(reports, problem), remedy)


def _memory(reports: Mapping[str, NodeReport]) -> Check:
    def problem(report: NodeReport) -> str:
        enough = report.shm_free_gib >= MIN_SHM_GIB
        return "" if enough else f"{report.shm_free_gib:.2f} GiB free"

    least = min(report.shm_free_gib for report in reports.values())
    good = f"at least {least:.1f} GiB of shared memory free"
    remedy = (
        "give the container more (--shm-size=8g, or an emptyDir with medium: Memory at /dev/shm)"
    )
    return _check("memory", good, _problems(reports, problem), remedy)


def _mlflow(examination: Examination, reports: Mapping[str, NodeReport]) -> Check:
    uri = examination.tracking_uri
    if not uri:
        return _check("mlflow", "the service runs without one", [], "")
    own = examination.tracking_error
    wrong = [f"the service: {own}"] if own else []
    wrong += _problems(reports, lambda report: report.mlflow_error)
    remedy = "start it, or open its port to the nodes; where it refuses, correct the login"
    return _check("mlflow", f"{authorization(uri, {})[0]} answers every node", wrong, remedy)
