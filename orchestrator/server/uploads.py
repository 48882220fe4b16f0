"""Zips that a client uploads: bounded while they arrive, checked before anything unpacks them."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from fastapi import HTTPException, Request

MAX_SUBMISSION = 256 << 20
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
    if sum(entry.file_size for entry in _entries(data)) > limit_mib << 20:
        raise HTTPException(413, f"code: unpacks to more than {limit_mib} MiB")
    # A zip may lie about sizes and sums; its files must be what it says before a node unpacks them.
    with _sound(), zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise HTTPException(400, f"code: {broken!r} holds other bytes than the package says")


@contextmanager
def _sound() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise HTTPException(400, f"code: cannot be unpacked ({error})") from None


def _entries(data: bytes) -> list[zipfile.ZipInfo]:
    """The files of a zip. Refuses a name that leads out of the folder it is unpacked into."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise HTTPException(400, f"code: is no zip ({error})") from None
    for entry in entries:
        path = PurePosixPath(entry.filename)
        # The upper half of the attributes is the mode of the Unix file that was packed. A symbolic
        # link may point anywhere.
        is_link = (entry.external_attr >> 16) & _KIND == _LINK
        # Windows reads backslashes and drive letters, whoever packs there.
        foreign = "\\" in entry.filename or re.match("[A-Za-z]:", entry.filename)
        if path.is_absolute() or ".." in path.parts or foreign or is_link:
            raise HTTPException(400, f"code: {entry.filename!r} leaves the package")
    return entries
