"""`python -m workers.probe PLAN`: examines one node of a cluster and prints a line of JSON.

`python -m workers.probe gpu` looks at this node's GPUs alone.

`maskray doctor` starts a probe on every node at once, before trials run there. The probes meet at a
store on the first node. From there they compare clocks, read each other's files in the storage and
sum numbers in pairs, as the ranks of a gang will.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from contract.attempt import (
    PROBE_REPORT,
    PROBE_STORE,
    ClockReport,
    GpuReport,
    LinkReport,
    NodeReport,
    ProbePlan,
)
from contract.command import run_command
from contract.files import Files
from contract.machine.logins import NAME, authorization
from contract.machine.proxies import proxy_for
from model.cpu import native

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "mlflow", "pycocotools", "pydantic")
_SOURCES = ("contract", "model", "pipelines", "workers")
_FLOATS = 1 << 20  # of an all-reduce: 4 MiB
_REPEATS = 5  # all-reduces whose mean is the rate of a link
_MOST_PAIR_S = 30.0  # for one pair: a link that is broken must not use up everybody's patience
_MOST_ERROR_CHARS = 300
_GPU = "gpu"
_GPU_PATIENCE_S = 60.0  # torch starts CUDA and Triton compiles each kernel


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        raise ValueError("give one argument, the plan as JSON; maskray doctor does")
    if argv[0] == _GPU:
        print(f"{PROBE_REPORT} {look_at_gpu().model_dump_json()}", flush=True)
        return 0
    plan = ProbePlan.model_validate_json(argv[0])
    report = look(plan)
    print(f"{PROBE_REPORT} {report.model_dump_json()}", flush=True)
    return 0


def look(plan: ProbePlan) -> NodeReport:
    """What this node finds alone and with the others."""
    alone = NodeReport(
        index=plan.index,
        host=socket.gethostname(),
        now=time.time(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "kernels for the CPU (model/cpu/native.c)": "compiled"
            if native.available()
            else "absent",
        },
        sources=sources_hash(),
        gpu_driver=_gpu_driver(),
        disk_free_gib=shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        shm_free_gib=_shm_free_gib(),
        mlflow_error=mlflow_error(plan.mlflow, tries_login=not plan.study_logins),
    )
    try:
        store = _meet(plan)
    except (RuntimeError, OSError) as error:
        gpu = _gpu(alone.gpu_driver)
        return alone.model_copy(update={"meeting_error": _one_line(error), "gpu": gpu})
    with suppress(RuntimeError):  # who is late goes on alone and names the nodes that it missed
        _barrier(store, plan, "start")
    together = {
        "storage_error": _storage_error(store, plan),
        "clock": _clock(store, plan),
        "links": [_link(store, plan, peer) for peer in partners(plan.index, plan.nodes)],
    }
    with suppress(RuntimeError):
        _part(store, plan)
    # last, when nobody waits for this node: Triton compiles for a while
    return alone.model_copy(update={**together, "gpu": _gpu(alone.gpu_driver)})


def partners(index: int, nodes: int) -> Iterator[int]:
    """The node that `index` meets in each round.

    Every pair meets once, and no node has two partners at a time (the circle method).
    """
    seats = nodes + nodes % 2  # with an odd number, one seat is empty: its partner has a round off
    for turn in range(seats - 1):
        if index == seats - 1:
            other = turn * seats // 2 % (seats - 1)
        else:
            other = (turn - index) % (seats - 1)
            other = seats - 1 if other == index else other
        if other < nodes:
            yield other


# --- alone ---


def sources_hash() -> str:
    """SHA-256 over the sources of a run as this node has them installed.

    A node with other sources would train another model under the same name.
    """
    top, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for room in _SOURCES:
        for path in sorted((top / room).rglob("*.py")):
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(top)}\0{own}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _gpu_driver() -> str:
    """ "NVIDIA 550.54, 8 devices"; empty on a node without GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi hangs"
    versions = done.stdout.split()
    return (
        f"NVIDIA {versions[0]}, {len(versions)} devices"
        if versions and done.returncode == 0
        else "nvidia-smi fails"
    )


def _gpu(driver: str) -> GpuReport | None:
    """`look_at_gpu` in a process of its own: a driver that hangs or aborts takes only that one.

    None if the node has no working driver.
    """
    if not driver.startswith("NVIDIA"):
        return None
    command = [sys.executable, "-m", "workers.probe", _GPU]
    # Ray hides all GPUs from a job that asks for none, by an empty list
    environment = dict(os.environ)
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_GPU_PATIENCE_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return GpuReport(error=f"torch does not answer within {_GPU_PATIENCE_S:.0f} s")
    for line in done.stdout.splitlines():
        if line.startswith(PROBE_REPORT):
            return GpuReport.model_validate_json(line.removeprefix(PROBE_REPORT))
    words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return GpuReport(error=words[-1][:_MOST_ERROR_CHARS])


def look_at_gpu() -> GpuReport:
    """What this process's torch says of the first GPU."""
    # only where there are GPUs: the detector's modules take a second to import
    from model.accelerate import complaints, kernels
    from workers.training.arithmetic import gpu_name, native_precisions

    if not torch.cuda.is_available():
        return GpuReport(
            error=f"torch {torch.__version__} finds no GPU"
            + ("" if torch.version.cuda else ", it is a build without CUDA")
        )
    gpu = torch.device("cuda", 0)
    return GpuReport(
        name=gpu_name(gpu),
        precisions=native_precisions(gpu),
        kernels=kernels(gpu),
        complaints=complaints(gpu),
    )


def _shm_free_gib() -> float:
    folder = Path("/dev/shm")  # noqa: S108
    return shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else 0.0


def mlflow_error(uri: str, *, tries_login: bool = True) -> str:
    """Why this node does not reach the tracking server; empty if it does, or if there is none."""
    if not uri.startswith(("http://", "https://")):
        return ""
    url, login = authorization(uri, os.environ)
    try:
        proxy = proxy_for(url)
        through = urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {})
        opener = urllib.request.build_opener(through)
        with opener.open(f"{url}/health", timeout=10) as answer:
            if answer.status != 200:
                return f"status {answer.status}"
        if not tries_login:
            return ""
        # /health asks for no login: this does, with this node's own variables
        path = "/api/2.0/mlflow/experiments/search"
        body = json.dumps({"max_results": 1}).encode()
        json_type = {"Content-Type": "application/json"}
        question = urllib.request.Request(url + path, body, json_type)
        if login:
            question.add_header("Authorization", login)
        with opener.open(question, timeout=10):
            return ""
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            if not login:
                return "asks for a login: set MLFLOW_TRACKING_USERNAME and _PASSWORD there"
            user = urlsplit(uri).username or os.environ.get(NAME, "")
            whose = f"login of user {user!r}" if user else "token in MLFLOW_TRACKING_TOKEN"
            return f"refuses the {whose}: correct it there (status {error.code})"
        return "" if error.code == 404 else _one_line(error)
    except (OSError, ValueError) as error:
        return _one_line(error)


# --- together ---


def _meet(plan: ProbePlan) -> Store:
    """The store of all probes.

    The first probe opens it and prints its address, which the service puts into the others' plans.
    """
    patience = timedelta(seconds=plan.patience_s)
    if plan.index == 0:
        # on this address alone: a TCPStore by itself listens on all of them
        listener = socket.create_server((plan.address, 0))
        port = listener.getsockname()[1]
        store = TCPStore(
            plan.address,
            port,
            None,
            True,
            patience,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        print(f"{PROBE_STORE} {plan.address}:{port}", flush=True)
        return store
    host, _, port = plan.store.rpartition(":")
    return TCPStore(
        host, int(port), None, is_master=False, timeout=patience, wait_for_workers=False
    )


def _barrier(store: Store, plan: ProbePlan, name: str) -> None:
    """Raises RuntimeError if not all come in time."""
    store.set(f"{name}/{plan.index}", "here")
    store.wait(
        [f"{name}/{index}" for index in range(plan.nodes)], timedelta(seconds=plan.patience_s)
    )


def _part(store: Store, plan: ProbePlan) -> None:
    """The store lives in the first probe's process, which leaves last."""
    _barrier(store, plan, "end")
    if plan.index:
        store.set(f"left/{plan.index}", "")
    elif plan.nodes > 1:
        store.wait(
            [f"left/{index}" for index in range(1, plan.nodes)], timedelta(seconds=plan.patience_s)
        )


def _storage_error(store: Store, plan: ProbePlan) -> str:
    """Writes a file, and reads those of the other nodes and of the service.

    Returns what went wrong, empty if nothing did.
    """
    error = ""
    storage = None
    try:
        storage = Files(plan.storage)
        storage.write(f"{plan.folder}/{plan.index}", _content(plan, plan.index))
    except (OSError, RuntimeError, ValueError) as failure:
        error = f"cannot write: {_one_line(failure)}"
    try:
        _barrier(store, plan, "written")
    except RuntimeError:
        return error or "other nodes did not come to write theirs"
    for index in (-1, *range(plan.nodes)):  # -1 is the service
        if error or storage is None:
            break
        whose = "the service" if index < 0 else f"node {index}"
        try:
            if storage.read(f"{plan.folder}/{index}") != _content(plan, index):
                error = f"the file of {whose} reads differently here"
        except FileNotFoundError:
            error = f"the file of {whose} is not here"
        except OSError as failure:
            error = f"cannot read the file of {whose}: {_one_line(failure)}"
    return error


def _content(plan: ProbePlan, index: int) -> bytes:
    return f"{plan.folder} {index}\n".encode() * 1000


def _clock(store: Store, plan: ProbePlan) -> ClockReport | None:
    """The first node's clock minus this one's.

    None on the first node, which answers the others one after the other, and if somebody is late.
    """
    patience = timedelta(seconds=plan.patience_s)
    try:
        if plan.index:
            store.wait([f"turn/{plan.index}"], patience)
            begin = time.time()
            store.set(f"ask/{plan.index}", "?")
            answer = float(store.get(f"answer/{plan.index}"))
            end = time.time()
            # the answer is as old as half the way there and back, give or take that half
            return ClockReport(offset_s=answer - (begin + end) / 2, uncertainty_s=(end - begin) / 2)
        for index in range(1, plan.nodes):
            store.set(f"turn/{index}", "")
            store.wait([f"ask/{index}"], patience)
            store.set(f"answer/{index}", repr(time.time()))
    except RuntimeError:
        return None
    return None


def _link(store: Store, plan: ProbePlan, peer: int) -> LinkReport:
    """All-reduces of 4 MiB with one other node, as gloo sets them up by default."""
    low, high = sorted((plan.index, peer))
    before = _local_ends()  # the connections of the pair are those that come after
    pair = PrefixStore(f"pair/{low}-{high}", store)
    patience = timedelta(seconds=min(plan.patience_s, _MOST_PAIR_S))
    try:
        dist.init_process_group(
            "gloo", store=pair, rank=int(plan.index == high), world_size=2, timeout=patience
        )
    except (RuntimeError, ValueError) as error:
        return LinkReport(peer=peer, error=_one_line(error))
    try:
        values = torch.full((_FLOATS,), float(plan.index + 1))
        dist.all_reduce(values)
        if not bool((values == low + high + 2).all()):
            return LinkReport(peer=peer, error="the sum is wrong")
        ends = sorted(_local_ends() - before)
        started = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(values)
        seconds = (time.perf_counter() - started) / _REPEATS
    except RuntimeError as error:
        return LinkReport(peer=peer, error=_one_line(error))
    finally:
        dist.destroy_process_group()
    # gloo takes the address that the host's name resolves to, which may be the wrong interface
    address = ends[0][0] if ends else ""
    return LinkReport(
        peer=peer, address=address, interface=_interface(address), mib_per_s=4 / seconds
    )


def _local_ends() -> set[tuple[str, int]]:
    """This process's side of its connections: address and port."""
    return {
        (one.laddr[0], one.laddr[1])
        for one in psutil.Process().net_connections(kind="tcp")
        if one.status == psutil.CONN_ESTABLISHED and one.raddr
    }


def _interface(address: str) -> str:
    plain = address.removeprefix("::ffff:")  # of an IPv4 address in an IPv6 socket
    names = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if any(e.address in (address, plain) for e in entries)
    ]
    return names[0] if names else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MOST_ERROR_CHARS] or type(error).__name__


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), sys.argv))
