"""A trial's folder on a local path or behind any `pyarrow.fs` URI, with atomic replacement of whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow.fs as pafs


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


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
        """Whatever a writer makes of a write that failed, the block raises the first one's own error."""
        try:
            yield
        finally:
            if self._error is not None:
                raise self._error

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Storage:
    """Files below one root. Paths are relative and use `/`; a file appears whole or not at all."""

    def __init__(self, uri: str) -> None:
        """Raises ValueError if `uri` has a scheme that pyarrow cannot open."""
        self.uri = uri
        self.local: Path | None = None
        scheme = urlsplit(uri).scheme
        if scheme in ("", "file") or (len(scheme) == 1 and os.name == "nt"):
            self.local = Path(uri.removeprefix("file://")).absolute()
            self._fs, self._root = pafs.LocalFileSystem(), str(self.local)
        else:
            try:
                self._fs, self._root = pafs.FileSystem.from_uri(uri)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"storage {uri!r} cannot be opened: {error}; give a path or a pyarrow.fs URI"
                ) from None

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._fs.open_input_stream(self._full(path)) as stream:
            data: bytes = stream.read()
        return data

    def exists(self, path: str) -> bool:
        if self.local is not None:
            return (self.local / path).exists()
        kind = self._fs.get_file_info(self._full(path)).type
        return bool(kind != pafs.FileType.NotFound)

    def names(self, folder: str) -> list[str]:
        """Names directly below `folder`, sorted; none if it does not exist."""
        selector = pafs.FileSelector(self._full(folder), allow_not_found=True)
        return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def write(self, path: str, data: bytes) -> None:
        with self.replacing(path) as sink:
            sink.write(data)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1).encode())

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    @contextmanager
    def replacing(self, path: str) -> Iterator[Sink]:
        """A sink whose bytes become the file `path` when the block ends; an error leaves the old file as it was.

        On a local path: written aside, synced, renamed, and the folder synced. On an object store: one upload.
        """
        with explained(self.uri, path):
            if self.local is not None:
                with _local_replacing(self.local / path) as sink:
                    yield sink
            else:
                self._fs.create_dir(self._full(path).rsplit("/", 1)[0], recursive=True)
                with self._fs.open_output_stream(self._full(path)) as stream:
                    yield stream

    def delete(self, path: str) -> None:
        """Deletes a file or a folder with all below it; nothing happens if there is none."""
        kind = self._fs.get_file_info(self._full(path)).type
        if kind == pafs.FileType.Directory:
            with suppress(
                FileNotFoundError
            ):  # GCS misses a marker of the folder, after all in it is gone
                self._fs.delete_dir(self._full(path))
        elif kind == pafs.FileType.File:
            self._fs.delete_file(self._full(path))

    def fetch(self, path: str, folder: Path) -> Path:
        """A local file with the content of `path`: itself, or a copy in `folder`."""
        if self.local is not None:
            return self.local / path
        copy = folder / path.rsplit("/", 1)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(self.read(path))
        return copy


@contextmanager
def _local_replacing(target: Path) -> Iterator[Sink]:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
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
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(uri: str, path: str) -> Iterator[None]:
    """Within the block a full disk raises RuntimeError with what was written where and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RuntimeError(
                f"no space left on {uri} while writing {path}; free some, or lower loop.keep_checkpoints; "
                "the run then resumes from its last checkpoint"
            ) from error
        raise
