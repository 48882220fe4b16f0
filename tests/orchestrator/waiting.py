"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 400  # until a test gives up; nothing is timed, and other tests have the cores


def wait_until(what: str, condition: Callable[[], Any], log: Path) -> Any:
    """The first true value of `condition`. After PATIENCE_S it fails with the end of `log`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(
        f"no {what} in {PATIENCE_S} s; {log.name} ends:\n{log.read_text()[-3000:]}"
    )
