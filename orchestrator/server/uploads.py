"""Zips that a client uploads: bounded while they arrive, checked before anything unpacks them."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from fastapi import HTTPException, Request

from orchestrator.trial_folder import REPORT_BYTES

MAX_SUBMISSION = 256 << 20
_MAX_REPORT_FILES = 2000
_MAX_NAME = 200  # characters of a file's name: file systems hold 255 bytes
_UNPACKED = 4  # a package of sources may unpack to so many times the limit of its zip
_KIND, _LINK = 0o170000, 0o120000  # of a Unix file mode, as stat.S_IFMT and stat.S_IFLNK


async def body_of(request: Request, limit: int) -> bytes:
    """The request's bytes. Answers 413 as soon as more than `limit` bytes have arrived."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the request is larger than {limit >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def check_code(data: bytes, sha256: str, max_mib: int) -> None:
    """Refuses a package that has another hash, leaves its folder or unpacks to too much."""
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise HTTPException(
            400,
            f"code: sha256 of the bytes is {actual[:12]}..., not {sha256[:12]}...; send it again",
        )
    limit_mib = _UNPACKED * max_mib
    if sum(entry.file_size for entry in _entries(data, "code")) > limit_mib << 20:
        raise HTTPException(413, f"code: unpacks to more than {limit_mib} MiB")
    # A zip may lie about sizes and sums; its files must be what it says before a node unpacks them.
    with _sound("code"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise HTTPException(400, f"code: {broken!r} holds other bytes than the package says")


def report_files(data: bytes) -> dict[str, bytes]:
    """The files of a packed report, by their path in it."""
    entries = [entry for entry in _entries(data, "report") if not entry.is_dir()]
    too_large = sum(entry.file_size for entry in entries) > REPORT_BYTES
    if too_large or len(entries) > _MAX_REPORT_FILES:
        raise HTTPException(413, "report: unpacks to too much")
    with _sound("report"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in entries}


def check_report_names(names: Iterable[str]) -> None:
    """Refuses names that no file system could hold beside each other."""
    paths = {name: PurePosixPath(name) for name in names}
    folders = {parent for path in paths.values() for parent in path.parents}
    for name, path in paths.items():
        if path in folders or not path.name or any(len(part) > _MAX_NAME for part in path.parts):
            raise HTTPException(
                400, f"report: {name[:_MAX_NAME]!r} is no name of a file; pack it again"
            )


@contextmanager
def _sound(what: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise HTTPException(400, f"{what}: cannot be unpacked ({error})") from None


def _entries(data: bytes, what: str) -> list[zipfile.ZipInfo]:
    """The files of a zip. Refuses a name that leads out of the folder it is unpacked into."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise HTTPException(400, f"{what}: is no zip ({error})") from None
    for entry in entries:
        path = PurePosixPath(entry.filename)
        # The upper half of the attributes is the mode of the Unix file that was packed. A symbolic
        # link may point anywhere.
        is_link = (entry.external_attr >> 16) & _KIND == _LINK
        # Windows reads backslashes and drive letters, whoever packs there.
        foreign = "\\" in entry.filename or re.match("[A-Za-z]:", entry.filename)
        if path.is_absolute() or ".." in path.parts or foreign or is_link:
            raise HTTPException(400, f"{what}: {entry.filename!r} leaves the package")
    return entries
