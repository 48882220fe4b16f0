"""Arrow IPC files as memory maps whose pages can be given back."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class MappedFile:
    """All record batches of an Arrow IPC file, without copies.

    The map is our own, not `pa.memory_map`, because the pages of ours can be let go. Else each
    process counts every page that it ever touched as its own, up to the size of its open shards.
    """

    def __init__(self, path: Path):
        """Raises RuntimeError, which names the file, if it is not a whole Arrow IPC file."""
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_WILLNEED)  # read ahead into the page cache
            reader = pa.ipc.open_file(pa.py_buffer(self._map))
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (FileNotFoundError, PermissionError):
            raise  # these name the file and the reason already
        except (pa.ArrowException, OSError, ValueError) as error:
            # Arrow fails on damaged bytes in many ways.
            reason = "is a folder" if path.is_dir() else f"is damaged ({error})"
            raise RuntimeError(f"{path}: {reason}; restore it or pack the data again") from error

    def let_go(self) -> None:
        """Takes the pages off this process; they stay in the page cache, and views stay valid."""
        self._map.madvise(mmap.MADV_DONTNEED)


def view(column: pa.Array) -> NDArray[Any]:
    """A column of numbers without nulls as NumPy sees it, without a copy."""
    # `Array.to_numpy` would import pandas: 30 MB a worker.
    return np.from_dlpack(column)
