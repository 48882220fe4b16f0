"""How a command of this room turns into a program of another one."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from contract.machine import streams


def become(module: str, *arguments: str) -> NoReturn:
    """Replaces this process, so that signals, streams and the exit status are the program's own."""
    streams.flush()  # exec drops what Python still buffers
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
