"""Logins that failed: written to the log, and answered ever more slowly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict

from fastapi import HTTPException

LOG = logging.getLogger("maskray")
_FREE = 5  # failures of an address that are answered at once: people mistype
_FIRST_S, _LONGEST_S = 0.5, 8.0
_FORGOTTEN_S = 900.0
_ADDRESSES = 4096  # that are remembered
_SLOWED_AT_ONCE = 64  # each holds a connection


class Failures:
    """By address. A valid token is never slowed: others may share its address, behind a proxy."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # with the last time
        self._slowed = 0

    async def slow_down(self, address: str) -> None:
        """Counts a failure and waits. Answers 429 where too many wait already."""
        count = self._count(address)
        # at 1, 10, 100, ...: a flood must not fill the disk
        if str(count).strip("0") == "1":
            LOG.warning("login failed: no valid token from %s, failure %d", address, count)
        if count <= _FREE:
            return
        if self._slowed >= _SLOWED_AT_ONCE:
            raise HTTPException(
                429, "too many failed logins; wait a moment", {"Connection": "close"}
            )
        self._slowed += 1
        try:
            await asyncio.sleep(min(_FIRST_S * 2.0 ** min(count - _FREE - 1, 9), _LONGEST_S))
        finally:
            self._slowed -= 1

    def _count(self, address: str) -> int:
        now = time.monotonic()
        count, last = self._counts.pop(address, (0, now))
        count = count + 1 if now - last < _FORGOTTEN_S else 1
        self._counts[address] = (count, now)
        if len(self._counts) > _ADDRESSES:
            self._counts.popitem(last=False)
        return count
