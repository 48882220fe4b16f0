"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 240  # until a test gives up; nothing is timed


def wait_until(what: str, condition: Callable[[], Any], log: Path) -> Any:
    """The first true value of `condition`; after PATIENCE_S the end of `log` is told."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(
        f"no {what} in {PATIENCE_S} s; {log.name} ends:\n{log.read_text()[-3000:]}"
    )
