"""Checkpoints: hashed, complete or ignored, fenced by attempt, written in the background.

A checkpoint is the folder `checkpoints/AAAA-SSSSSSSS` (attempt, step) with `state.pt` (tensors), `plain.json` (all
other state) and, written last, `complete.json` with the size and SHA-256 of both. Without a valid marker it does not
exist.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from contract.attempt import CHECKPOINT_FOLDER
from contract.files import Files, HashingSink

_CLAIM = f"{CHECKPOINT_FOLDER}/claim.json"
_NAME = re.compile(r"^(\d{4,})-(\d{8,})$")
_MARKER, _TENSORS, _PLAIN = "complete.json", "state.pt", "plain.json"


class FencedError(RuntimeError):
    """A newer attempt of the trial has taken over; this one must not write any more."""


class _DamagedError(Exception):
    """A checkpoint's bytes are not what its marker says."""


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` finished steps. tensors: nested dicts of CPU tensors and numbers. plain: JSON data."""

    step: int
    tensors: dict[str, Any]
    plain: dict[str, Any]


def check_claim(storage: Files, attempt: int, token: str = "") -> None:
    """Raises FencedError if a newer attempt has claimed the trial's folder.

    token: of the process's own claim, which another start of the same attempt replaces; empty if it made none.
    """
    try:
        claim = storage.read_json(_CLAIM)
    except FileNotFoundError:
        return
    holder = int(claim["attempt"])
    if holder > attempt:
        raise FencedError(
            f"attempt {holder} has taken over {storage.uri}; attempt {attempt} ends here"
        )
    if holder == attempt and token and claim.get("token") != token:
        raise FencedError(
            f"attempt {attempt} was started twice; the other start has taken over {storage.uri}"
        )


class CheckpointStore:
    """The checkpoints of one trial, as one attempt sees them."""

    def __init__(
        self, storage: Files, attempt: int, keep: int, warn: Callable[[str], None]
    ) -> None:
        self._storage, self._attempt, self._keep, self._warn = storage, attempt, keep, warn
        self._token = ""

    def claim(self) -> None:
        """Takes the folder for this start of this attempt. Raises FencedError if a newer attempt has it."""
        self.check_claim()
        self._token = uuid4().hex
        self._storage.write_json(_CLAIM, {"attempt": self._attempt, "token": self._token})

    def check_claim(self) -> None:
        """Raises FencedError if a newer attempt, or another start of this one, has claimed the folder."""
        check_claim(self._storage, self._attempt, self._token)

    def publish(self, snapshot: Snapshot) -> None:
        """Writes one checkpoint and deletes those beyond the last `keep`. Raises FencedError, RuntimeError."""
        self.check_claim()
        folder = f"{CHECKPOINT_FOLDER}/{self._attempt:04d}-{snapshot.step:08d}"
        self._storage.delete(f"{folder}/{_MARKER}")
        files = {}
        for name, dump in (
            (_TENSORS, lambda sink: torch.save(snapshot.tensors, sink)),
            (_PLAIN, lambda sink: sink.write(json.dumps(snapshot.plain).encode())),
        ):
            with self._storage.replacing(f"{folder}/{name}") as raw:
                sink = HashingSink(raw)
                with (
                    sink.telling()
                ):  # torch's zip writer turns an OSError into a RuntimeError of its own
                    dump(sink)
            files[name] = {"sha256": sink.hexdigest(), "bytes": sink.size}
        self.check_claim()
        marker = {"step": snapshot.step, "attempt": self._attempt, "files": files}
        self._storage.write_json(f"{folder}/{_MARKER}", marker)
        self._prune()

    def newest(self, below: int | None = None) -> str:
        """The newest undamaged checkpoint: of the latest attempt that has one, its highest step. Empty if none.

        below: only those of a step below this one.
        """
        for folder in self._folders():
            if below is not None and step_of(folder) >= below:
                continue
            try:
                self._verified(folder)
            except _DamagedError as error:
                self._warn(f"checkpoint {folder} is damaged ({error}); taking the one before")
            else:
                return folder
        return ""

    def load(self, folder: str) -> Snapshot:
        """Reads a folder that `newest` named. Raises RuntimeError if it was damaged since."""
        try:
            return self._load(folder)
        except _DamagedError as error:
            raise RuntimeError(
                f"checkpoint {folder} was damaged while it was read ({error}); start again"
            ) from None

    def plain(self, folder: str) -> dict[str, Any]:
        """The plain data alone of a folder that `newest` has just named."""
        found: dict[str, Any] = self._storage.read_json(f"{CHECKPOINT_FOLDER}/{folder}/{_PLAIN}")
        return found

    def _load(self, folder: str) -> Snapshot:
        files = self._verified(folder)
        tensors = torch.load(io.BytesIO(files[_TENSORS]), map_location="cpu", weights_only=True)
        return Snapshot(step_of(folder), tensors, json.loads(files[_PLAIN]))

    def _verified(self, folder: str) -> dict[str, bytes]:
        base = f"{CHECKPOINT_FOLDER}/{folder}"
        try:
            marker = json.loads(self._storage.read(f"{base}/{_MARKER}"))
            files = {name: self._storage.read(f"{base}/{name}") for name in (_TENSORS, _PLAIN)}
            for name, data in files.items():
                found, said = hashlib.sha256(data).hexdigest(), marker["files"][name]["sha256"]
                if found != said:
                    raise _DamagedError(
                        f"{name}: sha256 {found[:12]}..., marker says {said[:12]}..."
                    )
        except FileNotFoundError as error:
            raise _DamagedError(f"incomplete: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{_MARKER} cannot be read: {error}") from None
        return files

    def _folders(self) -> list[str]:
        """Newest first, complete or not."""
        found = [
            (int(m[1]), int(m[2]), m[0])
            for m in map(_NAME.match, self._storage.names(CHECKPOINT_FOLDER))
            if m
        ]
        return [name for _, _, name in sorted(found, reverse=True)]

    def _prune(self) -> None:
        complete = [
            n for n in self._folders() if self._storage.exists(f"{CHECKPOINT_FOLDER}/{n}/{_MARKER}")
        ]
        for name in complete[self._keep :]:
            self._storage.delete(
                f"{CHECKPOINT_FOLDER}/{name}/{_MARKER}"
            )  # first, so that no half remains valid
            self._storage.delete(f"{CHECKPOINT_FOLDER}/{name}")
        kept = set(complete[: self._keep])
        for name in self._storage.names(
            CHECKPOINT_FOLDER
        ):  # what a kill in the middle of a write left behind
            if (match := _NAME.match(name)) and name not in kept and int(match[1]) <= self._attempt:
                self._storage.delete(f"{CHECKPOINT_FOLDER}/{name}")


class BackgroundWriter:
    """Does what it is given on a thread, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, work: Callable[[], None]) -> None:
        """Starts `work`. Waits for the one before; raises what that one raised."""
        self.drain()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def drain(self) -> None:
        """Waits for the write under way. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what a finished write raised; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - carried to the loop's thread and raised there
            self._error = error


def step_of(folder: str) -> int:
    """Of a checkpoint's folder, as `CheckpointStore.newest` names it."""
    return int(folder.rpartition("-")[2])


def copied_to_host(state: Any) -> Any:
    """A copy of nested state whose tensors lie on the CPU and share no memory with the live ones."""
    match state:
        case Tensor():
            return state.detach().to("cpu", copy=True)
        case dict():
            return {key: copied_to_host(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(copied_to_host(value) for value in state)
        case _:
            return state


def tensors_of(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested state with their paths."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from tensors_of(value, f"{path}.{index}")
