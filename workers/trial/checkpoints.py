"""Checkpoints: hashed, complete or ignored, fenced by attempt, written in the background.

A checkpoint is the folder `checkpoints/AAAA-SSSSSSSS` (attempt, step) with `state.pt` (tensors),
`plain.json` (all other state) and, written last, `complete.json` with the size and SHA-256 of both.
Without a valid marker it does not exist.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from pydantic import JsonValue
from torch import Tensor

from contract.attempt import CHECKPOINT_FOLDER, CHECKPOINT_MARKER, CHECKPOINT_NAME
from contract.files import Files, HashingSink
from contract.record import Message, parse_record

_CLAIM = f"{CHECKPOINT_FOLDER}/claim.json"
_NAME = re.compile(r"^(\d{4,})-(\d{8,})$")
_MARKER, _TENSORS, _PLAIN = CHECKPOINT_MARKER, "state.pt", "plain.json"
# Checkpoints are what fills the disk of a trial's folder.
WHEN_FULL = (
    "free some there, or lower loop.keep_checkpoints; the run then resumes from its last checkpoint"
)


class FencedError(RuntimeError):
    """A newer attempt of the trial has taken over; this one must not write any more."""


class _DamagedError(Exception):
    """A checkpoint's bytes are not those that its marker names."""


class _Claim(Message):
    """Which attempt may write to the trial's folder. token: of one start of that attempt."""

    attempt: int
    token: str = ""


class _FileMark(Message):
    sha256: str
    bytes: int


class _Marker(Message):
    step: int
    attempt: int
    files: dict[str, _FileMark]


@dataclass(frozen=True)
class Snapshot:
    """The state after `step` finished steps.

    tensors: nested dicts of CPU tensors and numbers. plain: JSON data, which the training parses.
    """

    step: int
    tensors: dict[str, Any]
    plain: Mapping[str, JsonValue]


def _read_claim(storage: Files) -> _Claim | None:
    try:
        return _Claim.model_validate_json(storage.read(_CLAIM))
    except FileNotFoundError:
        return None


def claimed_attempt(storage: Files) -> int:
    """The attempt that holds the trial's folder, 0 if none does."""
    claim = _read_claim(storage)
    return claim.attempt if claim else 0


def check_claim(storage: Files, attempt: int, token: str = "") -> None:
    """Raises FencedError if a newer attempt has claimed the trial's folder.

    token: of the process's own claim, which another start of the same attempt replaces; empty if it
    made none.
    """
    claim = _read_claim(storage)
    if claim is None:
        return
    if claim.attempt > attempt:
        raise FencedError(
            f"attempt {claim.attempt} has taken over {storage.uri}; attempt {attempt} ends here"
        )
    if claim.attempt == attempt and token and claim.token != token:
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
        """Takes the folder for this start of this attempt.

        Raises FencedError if a newer attempt has it.
        """
        self.check_claim()
        # an attempt's number does not tell two starts of it apart
        self._token = uuid4().hex
        claim = _Claim(attempt=self._attempt, token=self._token)
        self._storage.write_json(_CLAIM, claim.model_dump())

    def check_claim(self) -> None:
        """Raises FencedError if a newer attempt, or another start of this one, has the folder."""
        check_claim(self._storage, self._attempt, self._token)

    def publish(self, snapshot: Snapshot) -> None:
        """Writes one checkpoint and deletes those beyond the last `keep`.

        Raises FencedError, or RuntimeError if the disk is full.
        """
        self.check_claim()
        name = CHECKPOINT_NAME.format(attempt=self._attempt, step=snapshot.step)
        folder = f"{CHECKPOINT_FOLDER}/{name}"
        # after a rollback the same step comes again: its old marker must not vouch for new files
        self._storage.delete(f"{folder}/{_MARKER}")
        files = {}
        for name, dump in (
            (_TENSORS, lambda sink: torch.save(snapshot.tensors, sink)),
            (_PLAIN, lambda sink: sink.write(json.dumps(snapshot.plain).encode())),
        ):
            with self._storage.replacing(f"{folder}/{name}") as raw:
                sink = HashingSink(raw)
                # torch's zip writer turns an OSError into a RuntimeError of its own
                with sink.telling():
                    dump(sink)
            files[name] = _FileMark(sha256=sink.hexdigest(), bytes=sink.size)
        self.check_claim()  # again: the files may have taken long
        marker = _Marker(step=snapshot.step, attempt=self._attempt, files=files)
        self._storage.write_json(f"{folder}/{_MARKER}", marker.model_dump())
        self._prune()

    def newest(self, below: int | None = None) -> str:
        """The newest undamaged checkpoint, empty if there is none.

        It is the highest step of the latest attempt that has one, even if an earlier attempt came
        further. below: only those of a step below this one.
        """
        # a whole checkpoint is read and hashed: half a file must not pass for the newest
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

    def plain(self, folder: str) -> dict[str, JsonValue]:
        """The plain data alone of a folder that `newest` has just named."""
        data = self._storage.read(f"{CHECKPOINT_FOLDER}/{folder}/{_PLAIN}")
        plain: dict[str, JsonValue] = json.loads(data)
        return plain

    def _load(self, folder: str) -> Snapshot:
        files = self._verified(folder)
        # weights_only: no code of a pickle runs, whoever wrote the file
        tensors = torch.load(io.BytesIO(files[_TENSORS]), map_location="cpu", weights_only=True)
        return Snapshot(step_of(folder), tensors, json.loads(files[_PLAIN]))

    def _verified(self, folder: str) -> dict[str, bytes]:
        """The bytes of both files. Raises _DamagedError."""
        base = f"{CHECKPOINT_FOLDER}/{folder}"
        try:
            marker = parse_record(_Marker, self._storage.read_json(f"{base}/{_MARKER}"), _MARKER)
            files = {name: self._storage.read(f"{base}/{name}") for name in (_TENSORS, _PLAIN)}
            for name, data in files.items():
                actual, expected = hashlib.sha256(data).hexdigest(), marker.files[name].sha256
                if actual != expected:
                    raise _DamagedError(
                        f"{name}: sha256 {actual[:12]}..., marker says {expected[:12]}..."
                    )
        except FileNotFoundError as error:
            raise _DamagedError(f"incomplete: {error}") from None
        except (ValueError, KeyError) as error:
            raise _DamagedError(f"{_MARKER} cannot be read: {error}") from None
        return files

    def _folders(self) -> list[str]:
        """Newest first, complete or not."""
        matches = map(_NAME.match, self._storage.names(CHECKPOINT_FOLDER))
        # numbers, not text: beyond 9999 attempts a name gets longer
        by_age = sorted(((int(m[1]), int(m[2]), m[0]) for m in matches if m), reverse=True)
        return [name for _, _, name in by_age]

    def _prune(self) -> None:
        """Deletes what is beyond the last `keep`, and what a kill left in the middle of a write."""
        folders = self._folders()
        complete = [
            n for n in folders if self._storage.exists(f"{CHECKPOINT_FOLDER}/{n}/{_MARKER}")
        ]
        kept = complete[: self._keep]
        for name in folders:
            # a newer attempt may be writing its own
            if name in kept or attempt_of(name) > self._attempt:
                continue
            # the marker first, so that half a checkpoint is never a valid one
            self._storage.delete(f"{CHECKPOINT_FOLDER}/{name}/{_MARKER}")
            self._storage.delete(f"{CHECKPOINT_FOLDER}/{name}")


class BackgroundWriter:
    """Runs one piece of work at a time on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, work: Callable[[], None]) -> None:
        """Starts `work`. Waits for the one before; raises what that one raised."""
        self.drain()
        # not a daemon: the interpreter waits for a checkpoint under way
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
        if self._error is not None:  # raised once; the writer can be used again
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the loop's thread raises it
            self._error = error


def step_of(folder: str) -> int:
    """Of a checkpoint's folder, as `CheckpointStore.newest` names it."""
    return int(folder.rpartition("-")[2])


def attempt_of(folder: str) -> int:
    return int(folder.partition("-")[0])


def copied_to_host(state: Any) -> Any:
    """A copy of nested state. Its tensors lie on the CPU and share no memory with the live ones."""
    match state:
        case Tensor():
            # copy=True, because on the CPU `to` gives back the same tensor
            return state.detach().to("cpu", copy=True)
        case dict():
            return {key: copied_to_host(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(copied_to_host(value) for value in state)
        case _:
            return state
