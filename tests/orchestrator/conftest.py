"""What the tests of ledger and server share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def nest() -> Iterator[Callable[[Path], Path]]:
    """Makes 1,100 folders in one another, which neither Python nor pytest can remove.

    They go whatever becomes of the test: pytest would meet them three runs later, and end with an
    error that names nothing.
    """
    made: list[Path] = []

    def build(folder: Path) -> Path:
        made.append(folder / "d")
        handle = os.open(folder, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=handle)
            below = os.open("d", os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = below
        os.close(handle)
        return made[-1]

    yield build
    subprocess.run(["rm", "-rf", *map(str, made)], check=True)
