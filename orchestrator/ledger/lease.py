"""The lease: one service acts on a ledger at a time.

The service renews its lease every few seconds. A lease that ran out is free for the next service.
"""

from __future__ import annotations

import os
import socket

import psutil
from sqlalchemy import insert, select, update

from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import LEASE

LEASE_S = 30.0


def take_lease(ledger: Ledger, holder: str, now: float) -> None:
    """Makes `holder` the ledger's one service. Raises RuntimeError while another one lives."""
    with ledger.writing() as transaction:
        # PostgreSQL lets two services read the same row; the lock makes the second one wait
        row = transaction.execute(select(LEASE).with_for_update()).first()
        others = row is not None and row.holder != holder and row.expires_at > now
        if row is not None and others and _may_live(row.host, row.process):
            raise RuntimeError(
                f"ledger: service {row.process} on {row.host} holds it for "
                f"{row.expires_at - now:.0f} s more; end that service first, or wait if it is dead"
            )
        transaction.execute(LEASE.delete())
        transaction.execute(
            insert(LEASE).values(
                id=1,
                expires_at=now + LEASE_S,
                holder=holder,
                host=socket.gethostname(),
                process=_process_name(os.getpid()),
            )
        )


def renew_lease(ledger: Ledger, holder: str, now: float) -> bool:
    """False if another service took the ledger: this one must end and change nothing."""
    with ledger.writing() as transaction:
        query = update(LEASE).where(LEASE.c.holder == holder).values(expires_at=now + LEASE_S)
        return transaction.execute(query).rowcount == 1


def holder_of(ledger: Ledger) -> str:
    """Which service has the ledger, in words."""
    with ledger.reading() as transaction:
        row = transaction.execute(select(LEASE)).first()
    return f"service {row.process} on {row.host}" if row is not None else "a service that has ended"


def drop_lease(ledger: Ledger, holder: str) -> None:
    """Lets the next service start at once."""
    with ledger.writing() as transaction:
        transaction.execute(LEASE.delete().where(LEASE.c.holder == holder))


def _may_live(host: str, process: str) -> bool:
    # Only on this host can we look for the process. A holder elsewhere counts as alive until its
    # lease runs out.
    if host != socket.gethostname():
        return True
    return _process_name(int(process.split("@")[0])) == process


def _process_name(pid: int) -> str:
    """Pid and start time; "" if it is dead.

    The system gives the pid of a dead process away again.
    """
    try:
        process = psutil.Process(pid)
        # a zombie is dead, but its parent has not asked for its exit status yet
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{pid}@{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return ""
