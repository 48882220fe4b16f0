"""The ranks of one run as a value: our rank, our device, and the collectives that the loop uses."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

# A collective ends its ranks when it takes longer. NCCL carries the steps, of which none lasts
# minutes. On the host the ranks wait for what rank 0 does alone: it scores a validation set, writes
# artifacts, tells the tracker. That is gloo's part, and its time is longer than any evaluation.
TIMEOUTS = {"nccl": timedelta(minutes=10), "gloo": timedelta(minutes=30)}
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """host_group: gloo, for objects and tensors on the host; None in a world of one rank."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values`, which lie on `device`, over the ranks in place; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_on_host(self, values: Tensor) -> Tensor:
        """Sums `values`, which lie on the CPU, over the ranks in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.host_group)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value on rank 0, in the order of ranks; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        into: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, into, group=self.host_group)
        return into or []

    def from_first(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]


def host_name() -> str:
    return socket.gethostname()


def join_world() -> World:
    """The world of an initialised default process group, or of this process alone."""
    if not dist.is_initialized():
        return World(0, 1, _device(0))
    rank, size = dist.get_rank(), dist.get_world_size()
    if dist.get_backend() == "gloo":
        group = cast("dist.ProcessGroup", dist.group.WORLD)
        return World(rank, size, torch.device("cpu"), group)
    # NCCL carries nothing but tensors on the device
    host_group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=TIMEOUTS["gloo"]))
    return World(rank, size, _device(int(os.environ.get("LOCAL_RANK", "0"))), host_group)


def world_alone(gpus: float) -> World:
    """The world of one rank to which Ray gave so many GPUs.

    A trial without any stays on the CPU, also on a node that has some: others use those. Raises
    RuntimeError if torch does not reach the GPU that was given.
    """
    if not gpus:
        return World(0, 1, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"Ray gave this rank a GPU of {host_name()}, and torch reaches none there; "
            '"maskray doctor" says what is wrong with the node'
        )
    return World(0, 1, _device(0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def check_own_gpus(world: World) -> None:
    """Raises ValueError on every rank if two ranks sit on one GPU.

    NCCL would refuse them as well ("Duplicate GPU detected"), later and without a remedy.
    """
    if world.size == 1 or world.device.type != "cuda":
        return
    places = world.gather((host_name(), _bus_id(world.device)))
    shared = {place: ranks_at(place, places) for place in places if places.count(place) > 1}
    # rank 0 has looked for all
    refused = world.from_first(
        [
            f"ranks {', '.join(map(str, ranks))} share GPU {bus_id} of {host}"
            for (host, bus_id), ranks in shared.items()
        ]
    )
    if refused:
        raise ValueError(
            f"{refused[0]}, and NCCL takes one rank a GPU; start no more ranks than there are GPUs "
            "(torchrun --nproc-per-node), in a study with resources.gpus_per_rank: 1"
        )


def ranks_at(place: T, places: Sequence[T]) -> list[int]:
    return [rank for rank, other in enumerate(places) if other == place]


def _bus_id(device: torch.device) -> str:
    """Where the GPU sits, as NCCL compares it: the parts of a MIG device have the same place."""
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack these three
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}"


def end_with_launcher() -> None:
    """On Linux the kernel then kills this process when its parent ends: no orphan trains on."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def launched_world(environment: Mapping[str, str]) -> Iterator[World]:
    """The world that torchrun's variables describe; without them, this process alone."""
    # torchrun starts the ranks from its main thread, so the kernel signals them when it ends
    if "TORCHELASTIC_RUN_ID" in environment:
        end_with_launcher()
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        yield join_world()
        return
    if torch.cuda.is_available():
        # before the process group: NCCL takes the current device
        _device(int(environment["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUTS[backend])
    try:
        yield join_world()
    finally:
        dist.destroy_process_group()
