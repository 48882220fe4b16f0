"""Requests without a valid token, as events of the ledger: one a minute for each address."""

from __future__ import annotations

import logging
import threading
import time

from contract.words import printable
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger, LedgerError, reason

LOG = logging.getLogger("maskray")
_EVERY_S = 60.0
_MAX_ADDRESSES = 1000  # that are counted apart; a flood must fill neither memory nor ledger


class RefusedLogins:
    """A service's. A client that tries a thousand tokens becomes one event that counts them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}  # since the last event, by address
        self._told: dict[str, float] = {}

    def note(self, ledger: Ledger, address: str) -> None:
        now = time.time()
        with self._lock:
            if address not in self._told and len(self._told) >= _MAX_ADDRESSES:
                old = {name: at for name, at in self._told.items() if now - at < _EVERY_S}
                self._told = old
                if len(old) >= _MAX_ADDRESSES:
                    address = "many addresses"
            self._counts[address] = self._counts.get(address, 0) + 1
            if now - self._told.get(address, 0.0) < _EVERY_S:
                return
            self._told[address] = now
            count = self._counts.pop(address)
        text = f"{count} requests without a valid token from {printable(address)}"
        try:
            with ledger.writing() as transaction:
                record(transaction, "login-refused", text, study="")
        except LedgerError as error:  # the answer is 401 all the same
            LOG.warning("ledger: %s", reason(error))
