"""Files behind a folder or a pyarrow.fs URI: opened lazily, retried on a flaky store, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

RETRIES = 5
FIRST_PAUSE_S = 0.2
COPY_BYTES = 1 << 20
SCHEMES = ("s3", "gs", "gcs", "file")
LOCAL_ERRORS = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)  # trying again is no help

T = TypeVar("T")


class Store:
    """One folder. Holds only the URI until it is used, so it can be pickled into any worker."""

    def __init__(self, uri: str):
        self.uri = uri

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.uri:
            return fs.LocalFileSystem(), str(Path(self.uri).absolute())
        scheme, rest = self.uri.split("://", 1)
        if (
            scheme not in SCHEMES
        ):  # pyarrow has more, and some of them end the process when they fail
            raise ValueError(
                f"{self.name}: not a URI that pyarrow.fs opens here ({scheme!r} is none of {', '.join(SCHEMES)}); "
                "use a folder, s3://... or gs://..."
            )
        if scheme != "file" and not re.split("[/?]", rest)[0].rpartition("@")[2]:
            raise ValueError(f"{self.name}: names no bucket; write {scheme}://BUCKET/PATH")
        try:
            filesystem, path = fs.FileSystem.from_uri(self.uri)
        except (ValueError, TypeError) as error:
            reason = (
                str(error) if self.name == self.uri else "check its credentials and its options"
            )
            raise ValueError(
                f"{self.name}: not a URI that pyarrow.fs opens ({reason}); use a folder, s3://... or gs://..."
            ) from None
        return filesystem, path.rstrip("/")

    @property
    def name(self) -> str:
        """The URI as messages show it, without a password."""
        return re.sub("://[^?]*:[^?]*@", "://***@", self.uri)

    @property
    def local(self) -> Path | None:
        """The folder if it is on this machine's file system, else None."""
        filesystem, path = self._place
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def path(self, name: str) -> str:
        return f"{self._place[1]}/{name}"

    def read_bytes(self, name: str) -> bytes:
        def read() -> bytes:
            if self.local is not None:
                return Path(self.path(name)).read_bytes()
            with self._place[0].open_input_stream(self.path(name)) as source:
                return bytes(source.read())

        return retried(read, self.describe(name))

    def copy_to(self, name: str, target: Path, also: Callable[[bytes], object]) -> None:
        """Streams one file to `target` in small pieces; `also` sees each (to hash it). One attempt, no retry."""
        with self._place[0].open_input_stream(self.path(name)) as source, target.open("wb") as sink:
            while piece := source.read(COPY_BYTES):
                also(piece)
                sink.write(piece)

    def write_bytes(self, name: str, content: bytes) -> None:
        filesystem, _ = self._place
        target = self.path(name)
        if self.local is None:
            with filesystem.open_output_stream(target) as sink:
                sink.write(content)
            return
        part = Path(f"{target}.part-{os.getpid()}")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(target)

    def move_in(self, source: Path, name: str) -> None:
        """Puts a finished local file into the store and removes it from where it was."""
        filesystem, _ = self._place
        if self.local is not None:
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
            source.replace(self.path(name))
            return
        fs.copy_files(str(source), self.path(name), fs.LocalFileSystem(), filesystem)
        source.unlink()

    def size(self, name: str) -> int | None:
        """Bytes of one file, None if there is none."""
        info = self._place[0].get_file_info(self.path(name))
        return info.size if info.type == fs.FileType.File else None

    def sizes(self, names: list[str]) -> list[int | None]:
        infos = self._place[0].get_file_info([self.path(name) for name in names])
        return [info.size if info.type == fs.FileType.File else None for info in infos]

    def exists(self) -> bool:
        return bool(self._place[0].get_file_info(self._place[1]).type == fs.FileType.Directory)

    def remove(self, name: str) -> None:
        if self.size(name) is not None:
            self._place[0].delete_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        if self._place[0].get_file_info(self.path(name)).type == fs.FileType.Directory:
            with suppress(
                FileNotFoundError
            ):  # GCS misses a marker of the folder, after all in it is gone
                self._place[0].delete_dir(self.path(name))

    def describe(self, name: str) -> str:
        return f"{self.name.split('?')[0].rstrip('/')}/{name}"


def retried(action: Callable[[], T], what: str) -> T:
    """Calls `action` again after an OSError, with growing pauses; what is missing or forbidden is not retried."""
    for attempt in range(RETRIES):
        try:
            return action()
        except LOCAL_ERRORS:
            raise
        except OSError as error:
            if attempt == RETRIES - 1:
                raise RuntimeError(
                    f"{what}: {error}; tried {RETRIES} times; is the store reachable?"
                ) from error
            time.sleep(FIRST_PAUSE_S * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


def file_sha256(path: Path) -> str:
    """Of a local file's bytes, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
