"""Files below a folder or a `pyarrow.fs` URI. Every room reads and writes them through this class.

A file appears whole or not at all. A flaky store is tried again; a full disk names its remedy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from pyarrow import fs

TRIES = 5
FIRST_PAUSE_S = 0.2
COPY_BYTES = 1 << 20
SCHEMES = ("s3", "gs", "gcs", "file")
# An error of this kind says something about the path. To try again does not change it.
LASTING_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
FREE_SOME = "free some there"

T = TypeVar("T")


class UnreachableStoreError(RuntimeError, OSError):
    """A store failed again and again. Who handles an OSError of a disk handles this one too."""


class FullDiskError(RuntimeError, OSError):
    """A disk has no room. `errno` says which limit was met."""


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Files:
    """The files below one folder. Paths are relative and use `/`.

    An instance holds the URI alone until its first use, so it can be pickled into any worker.

    tries: how often an operation is tried before it raises UnreachableStoreError.
    when_full: what a person can do about a full disk; the end of FullDiskError's line. Every method
    raises ValueError for a URI that nothing here can open, and OSError for what the file system
    refuses.
    """

    def __init__(self, uri: str, tries: int = TRIES, when_full: str = FREE_SOME) -> None:
        self.uri = uri
        self.tries = tries
        self.when_full = when_full

    def __reduce__(self) -> tuple[type[Files], tuple[str, int, str]]:
        return type(self), (self.uri, self.tries, self.when_full)

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        from pyarrow import fs  # takes 0.1 s, and `maskray --help` needs no file

        scheme, mark, rest = self.uri.partition("://")
        if not mark:
            return fs.LocalFileSystem(), str(Path(self.uri).absolute())
        if (
            scheme not in SCHEMES
        ):  # pyarrow has more, and some of them end the process when they fail
            raise ValueError(
                f"{self.name}: not a URI that pyarrow.fs opens here ({scheme!r} is none of "
                f"{', '.join(SCHEMES)}); use a folder, s3://... or gs://..."
            )
        if scheme != "file" and not re.split("[/?]", rest)[0].rpartition("@")[2]:
            raise ValueError(f"{self.name}: names no bucket; write {scheme}://BUCKET/PATH")
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError, TypeError) as error:
            # pyarrow repeats the URI in its message: a password in it must not reach a log
            shown = str(error) if self.name == self.uri else "check its credentials and its options"
            raise ValueError(
                f"{self.name}: not a URI that pyarrow.fs opens ({shown}); "
                "use a folder, s3://... or gs://..."
            ) from None
        return filesystem, path.rstrip("/")

    @property
    def name(self) -> str:
        """The URI as messages show it, without a password."""
        return re.sub("://[^?]*:[^?]*@", "://***@", self.uri)

    @cached_property
    def local(self) -> Path | None:
        """The folder if it is on this machine's file system, else None."""
        from pyarrow import fs

        filesystem, path = self._place
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def path(self, path: str = "") -> str:
        """`path` as the file system names it."""
        return f"{self._place[1]}/{path}" if path else self._place[1]

    def describe(self, path: str) -> str:
        """`path` as messages name it."""
        return f"{self.name.split('?')[0].rstrip('/')}/{path}"

    # --- reading ------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""

        def read() -> bytes:
            if self.local is not None:
                return (self.local / path).read_bytes()
            with self._place[0].open_input_stream(self.path(path)) as source:
                return bytes(source.read())

        return self._retried(read, path)

    def read_part(self, path: str, offset: int = 0, limit: int = -1) -> bytes | None:
        """The bytes from `offset` on, at most `limit`; None if there is no such file."""

        def read() -> bytes:
            with self._place[0].open_input_file(self.path(path)) as file:
                start = min(offset, file.size())
                rest = file.size() - start
                return bytes(file.read_at(rest if limit < 0 else min(limit, rest), start))

        try:
            return self._retried(read, path)
        except FileNotFoundError:
            return None

    def read_json(self, path: str) -> Any:
        """Raises FileNotFoundError, and ValueError for what is not JSON."""
        return json.loads(self.read(path))

    def size(self, path: str) -> int | None:
        """Bytes of one file; None if there is none."""
        return self.sizes([path])[0]

    def sizes(self, paths: list[str]) -> list[int | None]:
        from pyarrow import fs

        wanted = [self.path(path) for path in paths]
        infos = self._retried(
            lambda: self._place[0].get_file_info(wanted), paths[0] if paths else ""
        )
        return [info.size if info.type == fs.FileType.File else None for info in infos]

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or folder of this name; without a name, the folder itself."""
        return self._kind(path) is not None

    def names(self, folder: str = "") -> list[str]:
        """Names directly below `folder`, sorted; none if it does not exist."""
        return sorted(info.base_name for info in self._below(folder, recursive=False))

    def changed_at(self) -> dict[str, float]:
        """The files directly in this folder, with the Unix time of their last change."""
        infos = self._below("", recursive=False)
        return {info.base_name: info.mtime_ns / 1e9 for info in infos if info.is_file}

    def folder_bytes(self, folder: str = "") -> int:
        """The size of all files below `folder`; 0 if it does not exist."""
        return sum(info.size or 0 for info in self._below(folder, recursive=True) if info.is_file)

    @contextmanager
    def reading(self, path: str) -> Iterator[Source]:
        """The file's bytes as a stream. One try."""
        with self._place[0].open_input_stream(self.path(path)) as source:
            yield source

    def copy_to(self, path: str, target: Path, also: Callable[[bytes], object]) -> None:
        """Streams one file to `target` in small pieces; `also` sees each (to hash it). One try."""
        with self.reading(path) as source, target.open("wb") as sink:
            while piece := source.read(COPY_BYTES):
                also(piece)
                sink.write(piece)

    def fetch(self, path: str, folder: Path) -> Path:
        """A local file with the content of `path`: itself, or a copy in `folder`."""
        if self.local is not None:
            return self.local / path
        copy = folder / path.rsplit("/", 1)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(self.read(path))
        return copy

    # --- writing ------------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """Replaces the file as a whole."""

        def write() -> None:
            with self.replacing(path) as sink:
                sink.write(data)

        self._retried(write, path)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1).encode())

    @contextmanager
    def replacing(self, path: str) -> Iterator[Sink]:
        """A sink whose bytes become the file `path` when the block ends.

        An error in the block leaves the old file as it was. On a local path the bytes are written
        aside, synced and renamed, and the folder is synced. On an object store they are one upload.
        Raises FullDiskError with the remedy if the disk is full.
        """
        with explained(self.name, path, self.when_full):
            if self.local is not None:
                with _replacing_local(self.local / path) as sink:
                    yield sink
            else:
                # S3 has no folders, but a store of another kind may ask for them
                self._place[0].create_dir(self.path(path).rsplit("/", 1)[0], recursive=True)
                with self._place[0].open_output_stream(self.path(path)) as stream:
                    yield stream

    def move_in(self, source: Path, path: str) -> None:
        """Puts a finished local file below this folder and removes it from where it was."""
        from pyarrow import fs

        if self.local is not None:
            target = self.local / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as file:
                os.fsync(file.fileno())
            source.replace(target)
            _sync_folder(target.parent)
            return
        target_path = self.path(path)
        self._retried(
            lambda: fs.copy_files(str(source), target_path, fs.LocalFileSystem(), self._place[0]),
            path,
        )
        source.unlink()

    def delete(self, path: str = "") -> None:
        """Deletes a file, or a folder with all below it; nothing happens if there is none."""
        from pyarrow import fs

        kind = self._kind(path)
        if kind == fs.FileType.Directory:
            with suppress(
                FileNotFoundError
            ):  # GCS misses a marker of the folder, after all in it is gone
                self._place[0].delete_dir(self.path(path))
        elif kind is not None:
            self._place[0].delete_file(self.path(path))

    # --- below --------------------------------------------------------------------------------

    def _kind(self, path: str) -> fs.FileType | None:
        from pyarrow import fs

        info = self._retried(lambda: self._place[0].get_file_info(self.path(path)), path)
        return None if info.type == fs.FileType.NotFound else info.type

    def _below(self, folder: str, recursive: bool) -> list[fs.FileInfo]:
        from pyarrow import fs

        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=recursive)
        found: list[fs.FileInfo] = self._retried(
            lambda: self._place[0].get_file_info(selector), folder
        )
        return found

    def _retried(self, action: Callable[[], T], path: str) -> T:
        return retried(
            action, self.describe(path), self.tries
        )  # a local path may be a network's too


def retried(action: Callable[[], T], what: str, tries: int = TRIES) -> T:
    """Calls `action` again after an OSError, with growing pauses; a lasting error is raised.

    Raises UnreachableStoreError after the last try.
    """
    for attempt in range(tries):
        try:
            return action()
        except LASTING_ERRORS:
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise
            if attempt == tries - 1:
                raise UnreachableStoreError(
                    f"{what}: {error}; tried {tries} times; is the store reachable?"
                ) from error
            # many ranks meet the same failure; chance keeps them from coming back together
            time.sleep(FIRST_PAUSE_S * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


class HashingSink:
    """Passes bytes on and keeps their SHA-256 and number."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        try:
            self._sink.write(view)  # type: ignore[arg-type]
        except OSError as error:
            self._error = self._error or error
            raise
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """What reached the sink is flushed when its file is closed."""

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The block raises the first failed write's own error, whatever the writer made of it."""
        try:
            yield
        finally:
            if self._error is not None:
                raise self._error

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def explained(where: str, path: str, remedy: str = FREE_SOME) -> Iterator[None]:
    """Within the block a full disk raises FullDiskError: what was written, where, the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            full = FullDiskError(f"no space left on {where} while writing {path}; {remedy}")
            full.errno = error.errno
            raise full from error
        raise


def uri_join(base: str, *parts: str) -> str:
    """`base/parts`, of a path or a URI; a URI's query stays at the end."""
    head, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return "/".join([head.rstrip("/"), *parts]) + mark + query


def split(uri: str) -> tuple[str, str]:
    """The folder of a path or URI, with its query, and the last name in it."""
    head, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    folder, _, name = head.rpartition("/")
    return (folder or ("/" if head.startswith("/") else ".")) + mark + query, name


def finite(value: Any) -> Any:
    """`value` as strict JSON can say it: a number that is not finite becomes None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def file_sha256(path: Path) -> str:
    """Of a local file's bytes, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


@contextmanager
def _replacing_local(target: Path) -> Iterator[Sink]:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two writers may be threads of one process, so the process alone does not make a name unique.
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Without it a crash of the machine may lose the new name of a file whose bytes are safe."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
