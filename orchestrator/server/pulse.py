"""Whether a service lives: its lease on the ledger, and how long ago its loop ended a turn."""

from __future__ import annotations

import logging
import os
import threading
import time

from contract.answers import Health
from orchestrator.ledger import lease
from orchestrator.ledger.opening import Ledger, LedgerError, reason

LOG = logging.getLogger("maskray")
_EVERY_S = 5.0  # between two renewals
_SILENT_S = 3 * _EVERY_S
_STUCK_S = 180.0  # a turn that starts a Ray head, or many trials, takes a minute or two


class Pulse:
    """One service's. `holder` has the lease when this object is made."""

    def __init__(self, ledger: Ledger, holder: str) -> None:
        self._ledger = ledger
        self._holder = holder
        self._turned = self._renewed = time.monotonic()

    def turned(self) -> None:
        """The loop ended a turn."""
        self._turned = time.monotonic()

    def health(self, version: str) -> Health:
        """Asks nobody: it must answer while the loop or the database stands still."""
        now = time.monotonic()
        loop_s, ledger_s = now - self._turned, now - self._renewed
        problems = []
        if loop_s > _STUCK_S:
            problems.append(f"the loop stands still for {loop_s:.0f} s: see the log")
        if ledger_s > _SILENT_S:
            problems.append(f"the ledger takes no write for {ledger_s:.0f} s: see the log")
        return Health(
            ok=not problems,
            version=version,
            loop_s=round(loop_s, 1),
            ledger_s=round(ledger_s, 1),
            problems=problems,
        )

    def keep(self, ending: threading.Event) -> None:
        """Renews the lease until `ending` is set. Ends the process if the lease is lost."""
        while not ending.wait(_EVERY_S):
            if why := self.renew():
                LOG.error("%s: ending without touching anything", why)
                os._exit(1)  # an orderly end would stop the Ray head, which may be another's now

    def renew(self) -> str:
        """Why this service must end, empty if it may go on."""
        try:
            held = lease.renew_lease(self._ledger, self._holder, time.time())
            other = "" if held else lease.holder_of(self._ledger)
        except LedgerError as error:
            LOG.warning("lease: %s", reason(error))
            # The database may be back before the lease runs out: until then no other service took
            # it.
            silent_s = time.monotonic() - self._renewed
            if silent_s < lease.LEASE_S:
                return ""
            words = f"the ledger took no renewal of the lease for {silent_s:.0f} s"
            return f"{words} ({reason(error)}{_cure(reason(error))})"
        silent_s = time.monotonic() - self._renewed
        if other:
            return f"{other} took the ledger, after {silent_s:.0f} s without a renewal"
        self._renewed = time.monotonic()
        return ""


def _cure(words: str) -> str:
    """What a person can do, for what databases say most often."""
    if "disk" in words or "No space" in words:
        return ": free space on the database's disk"
    if "locked" in words or "timeout" in words:
        return ": another program holds the database, or its disk is slow"
    return ": is the database up?"
