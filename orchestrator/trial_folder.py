"""A trial's folder as the service reads and writes it. The service believes nothing in it.

The code of whoever submitted the study writes there: any name may be a link, a pipe, a folder or a
file of any size. So each read opens without blocking, follows no link, and takes no more than a
limit. Each refusal is a `TrialFileError`, which is about this one trial.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from contract.files import Files, explained
from contract.words import printable

SMALL_BYTES = 64 << 10  # progress, cursor
ANSWER_BYTES = 16 << 20  # result, outcome, spec: per class metrics of 1,200 categories are 1 MB
REPORT_BYTES = 256 << 20  # a study's page with its pictures
_DEPTH = 32  # of nested JSON; our own files have 4
_LARGEST = 2**63  # SQL holds no larger integer
_IN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK a pipe stops the reader until somebody writes.
_TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_TO_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_TRIALS_FILE = {
    errno.ELOOP: "is a link",
    errno.ENOTDIR: "lies below a file or a link, which is no folder",
    errno.EISDIR: "is a folder",
    errno.EEXIST: "is there already, and is no folder",
    errno.ENXIO: "is a pipe or a socket",
    errno.ENOTEMPTY: "is a folder",
    errno.EACCES: "cannot be opened by the service",
    errno.EPERM: "cannot be opened by the service",
    errno.ENAMETOOLONG: "has too long a name",
}
_OUT_OF_RANGE = ("less_than", "greater_than_equal", "less_than_equal", "greater_than")
_Answer = TypeVar("_Answer", bound=BaseModel)
Json: TypeAlias = JsonValue


class TrialFileError(ValueError):
    """A file of a trial is none that the service takes. One line: which, and what is wrong."""


class OtherFormError(TrialFileError):
    """A regular file of sound size whose text is not the JSON that it should be."""


class Use(NamedTuple):
    """What a folder takes. `whole` is False if it holds more files than were counted."""

    bytes: int
    whole: bool


class TrialFolder:
    """Every method raises TrialFileError for what the trial did, OSError for what its store did."""

    def __init__(self, uri: str) -> None:
        # One try: the loop's next turn is the next one, and nothing may wait for a dead store.
        self._files = Files(uri, tries=1)

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None if there is none."""
        if self._files.local is None:
            return self._files.size(path)
        with self._opened(path) as handle:
            return None if handle is None else os.fstat(handle).st_size

    def read(self, path: str, limit: int) -> bytes | None:
        """The whole file; None if there is none. Refuses one of more than `limit` bytes."""
        size = self.size(path)
        if size is None:
            return None
        # one byte more, because the file may grow after the look at its size
        data = self.read_part(path, 0, limit + 1) if size <= limit else None
        if size > limit or (data is not None and len(data) > limit):
            raise self._refused(path, f"has {size} bytes, more than the {limit} that it may have")
        return data

    def read_part(self, path: str, offset: int, limit: int) -> bytes | None:
        """At most `limit` bytes from `offset` on; None if there is no such file."""
        if self._files.local is None:
            return self._files.read_part(path, offset, limit)
        with self._opened(path) as handle:
            if handle is None:
                return None
            parts, left = [], limit
            while left and (part := os.pread(handle, min(left, 1 << 20), offset + limit - left)):
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

    def json(self, path: str, limit: int) -> Json:
        """What a JSON file holds, None if there is none; see `sound` for what may come back."""
        data = self.read(path, limit)
        if data is None:
            return None
        try:
            value = json.loads(data.decode())
        except RecursionError:
            raise self._refused(path, f"is nested deeper than {_DEPTH} levels") from None
        except UnicodeDecodeError:
            raise OtherFormError(f"{self._files.describe(path)}: is no UTF-8") from None
        except ValueError as error:
            raise OtherFormError(f"{self._files.describe(path)}: is no JSON ({error})") from None
        try:
            return sound(value)
        except ValueError as error:
            raise self._refused(path, str(error)) from None

    def record(self, record: type[_Answer], path: str, limit: int) -> _Answer | None:
        """A JSON file as a record; None if there is none."""
        value = self.json(path, limit)
        if value is None:
            return None
        try:
            return record.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            shown = repr(first["input"])[:80]
            problem = f"{where + ': ' if where else ''}{first['msg']}, got {shown}"
            # an honest file of another version has other fields, never such a number
            kind = TrialFileError if first["type"] in _OUT_OF_RANGE else OtherFormError
            raise kind(f"{self._files.describe(path)}: {problem}") from None

    def names(self, folder: str) -> list[str]:
        """Names directly below `folder`, sorted; none if it does not exist."""
        if self._files.local is None:
            return self._files.names(folder)
        with self._folder(_parts(folder)) as handle:
            return [] if handle is None else _names(handle)

    def write(self, path: str, data: bytes) -> None:
        """Replaces the file as a whole, and makes the folders above it."""
        if self._files.local is None:
            self._files.write(path, data)
            return
        *parents, name = _parts(path)
        aside = f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
        with (
            explained(self._files.name, path),
            self._judged(path),
            self._folder(parents, make=True) as folder,
        ):
            assert folder is not None
            handle = os.open(aside, _TO_WRITE, 0o666, dir_fd=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(aside, dir_fd=folder)
                raise

    def bytes_below(self, name: str) -> int:
        """The size of all files below one of its folders, 0 without one. Links count nothing."""
        return self.use(name, sys.maxsize).bytes

    def use(self, name: str, most_files: int) -> Use:
        """The same of at most so many files. A store behind a URI lists all of them at once."""
        if self._files.local is None:
            return Use(self._files.folder_bytes(name), True)
        total, left = 0, most_files
        with self._judged(name), suppress(NotADirectoryError), self._folder([name]) as top:
            for _, _, files, folder in os.fwalk(".", dir_fd=top) if top is not None else ():
                for file in files[:left]:
                    with suppress(FileNotFoundError):  # a trial may delete it meanwhile
                        total += os.stat(file, dir_fd=folder, follow_symlinks=False).st_size
                left -= len(files)
                if left < 0:
                    return Use(total, False)
        return Use(total, True)

    def delete(self, name: str) -> None:
        """Deletes one of its folders with all below it. What a link leads to stays."""
        if self._files.local is None:
            self._files.delete(name)
            return
        with self._judged(name), self._folder([]) as top:
            if top is None or name not in _names(top):
                return
            if stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=top)
            else:
                os.unlink(name, dir_fd=top)

    # --- below --------------------------------------------------------------------------------

    def _refused(self, path: str, why: str) -> TrialFileError:
        return TrialFileError(f"{self._files.describe(path)}: {why}")

    @contextmanager
    def _judged(self, path: str) -> Iterator[None]:
        """Says of an error of the file system whether it is the trial's."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_TRIALS_FILE:
                raise self._refused(path, _NO_TRIALS_FILE[error.errno]) from None
            raise
        except RecursionError:  # of `os.fwalk` and `rmtree`
            raise self._refused(
                path, "has folders nested too deep to walk; remove them by hand"
            ) from None

    @contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """A descriptor of a regular file, None if there is none."""
        *parents, name = _parts(path)
        with self._judged(path), self._folder(parents) as folder:
            try:
                handle = None if folder is None else os.open(name, _TO_READ, dir_fd=folder)
            except FileNotFoundError:
                handle = None
        if handle is None:
            yield None
            return
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
                raise self._refused(path, f"is {kind}, not a file")
            yield handle
        finally:
            os.close(handle)

    @contextmanager
    def _folder(self, parts: list[str], make: bool = False) -> Iterator[int | None]:
        """A descriptor of a folder, reached without links; None if it is not there."""
        root = self._files.local
        assert root is not None
        if make:
            root.parent.mkdir(parents=True, exist_ok=True)
        handles: list[int] = []
        try:
            # The folders above the trial's are the operator's, who may have links there.
            for part in (str(root), *parts):
                above = handles[-1] if handles else None
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=above)
                handles.append(os.open(part, _IN_FOLDER, dir_fd=above))
        except FileNotFoundError:
            for handle in handles:
                os.close(handle)
            yield None
            return
        except BaseException:
            for handle in handles:
                os.close(handle)
            raise
        try:
            yield handles[-1]
        finally:
            for handle in handles:
                os.close(handle)


def sound(value: Json, depth: int = 0) -> Json:
    """JSON as a ledger can hold it.

    A number that is not finite becomes None, and a character that is none of a text becomes its
    escape (`\\x00`): terminals, SQL and files choke on it. Raises ValueError for deep nesting and
    for an integer that SQL cannot hold.
    """
    if depth > _DEPTH:
        raise ValueError(f"is nested deeper than {_DEPTH} levels")
    match value:
        case bool() | None:
            return value
        case int():
            if not -_LARGEST <= value < _LARGEST:
                raise ValueError(f"holds the number {str(value)[:20]}..., which is out of range")
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return printable(value)
        case dict():
            return {printable(key): sound(item, depth + 1) for key, item in value.items()}
        case list():
            return [sound(item, depth + 1) for item in value]


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise TrialFileError(f"{printable(path)!r}: names no file of the trial's folder")
    return parts
