"""Logins that failed: counted by address, and answered ever more slowly."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import NamedTuple

from fastapi import HTTPException

from contract.words import printable

_FREE = 5  # failures of an address that are answered at once: people mistype
_FIRST_S, _LONGEST_S = 0.5, 8.0
_FORGOTTEN_S = 900.0
_ADDRESSES = 4096  # that are remembered
_SLOWED_AT_ONCE = 64  # each holds a connection


class Failure(NamedTuple):
    address: str
    number: int  # of this address

    @property
    def told(self) -> bool:
        """At 1, 10, 100, ...: a flood must not fill the disk."""
        return str(self.number).strip("0") == "1"

    @property
    def words(self) -> str:
        return f"no valid token from {printable(self.address)}, failure {self.number}"


class Failures:
    """By address. A valid token is never slowed: others may share its address, behind a proxy."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # with the last time
        self._slowed = 0

    def count(self, address: str) -> Failure:
        """One more failure of this address. Beyond many addresses they count as one."""
        now = time.monotonic()
        if address not in self._counts and len(self._counts) >= _ADDRESSES:
            oldest, (_, at) = next(iter(self._counts.items()))
            if now - at < _FORGOTTEN_S:
                address = "many addresses"
            else:
                del self._counts[oldest]
        count, last = self._counts.pop(address, (0, now))
        count = count + 1 if now - last < _FORGOTTEN_S else 1
        self._counts[address] = (count, now)
        return Failure(address, count)

    async def slow_down(self, failure: Failure) -> None:
        """Waits. Answers 429 where too many wait already."""
        if failure.number <= _FREE:
            return
        if self._slowed >= _SLOWED_AT_ONCE:
            raise HTTPException(
                429, "too many failed logins; wait a moment", {"Connection": "close"}
            )
        self._slowed += 1
        try:
            await asyncio.sleep(
                min(_FIRST_S * 2.0 ** min(failure.number - _FREE - 1, 9), _LONGEST_S)
            )
        finally:
            self._slowed -= 1
