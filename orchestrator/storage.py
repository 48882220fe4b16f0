"""Small files of a trial's folder, on a path or behind any `pyarrow.fs` URI."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyarrow import fs


def join(base: str, *parts: str) -> str:
    """`base/parts`, of a path or a URI (whose query stays at the end)."""
    head, mark, query = base.partition("?") if "://" in base else (base, "", "")
    return "/".join([head.rstrip("/"), *parts]) + mark + query


def read_bytes(uri: str, offset: int = 0, limit: int = -1) -> bytes | None:
    """The bytes from `offset` on, at most `limit`; None if there is no such file."""
    filesystem, path = _locate(uri)
    try:
        with filesystem.open_input_file(path) as file:
            size = file.size()
            count = max(0, size - offset) if limit < 0 else max(0, min(limit, size - offset))
            return bytes(file.read_at(count, min(offset, size)))
    except FileNotFoundError:
        return None


def exists(uri: str) -> bool:
    filesystem, path = _locate(uri)
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def size(uri: str) -> int:
    """Bytes of a file; 0 if there is none."""
    filesystem, path = _locate(uri)
    return int(filesystem.get_file_info(path).size or 0)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes whole or not at all: a local file appears by renaming, an object by its upload."""
    filesystem, path = _locate(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_bytes(data)
        partial.replace(target)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def delete(uri: str) -> None:
    """Removes one file if it is there."""
    filesystem, path = _locate(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Removes a folder and all that is in it, if it is there."""
    filesystem, path = _locate(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        with suppress(
            FileNotFoundError
        ):  # GCS misses a marker of the folder, after all in it is gone
            filesystem.delete_dir(path)


def folder_bytes(uri: str) -> int:
    """The size of all files below a folder; 0 if it is not there."""
    filesystem, path = _locate(uri)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
    return sum(
        info.size or 0
        for info in filesystem.get_file_info(selector)
        if info.type == fs.FileType.File
    )


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object with numbers that are not finite replaced by None; None if absent or half-written."""
    data = read_bytes(uri)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (
        ValueError
    ):  # a store without atomic replacement may show a torn file: the next look sees the whole one
        return None
    return finite(value) if isinstance(value, dict) else None


def finite(value: Any) -> Any:
    """`value` as strict JSON can say it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def _locate(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" in uri:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    return fs.LocalFileSystem(), str(Path(uri).absolute())
