"""Parts of a rank's or a driver's log, as long as the attempt runs and ever after."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import HTTPException
from sqlalchemy import select

from contract.answers import LogPage
from contract.attempt import LOG_FILE
from orchestrator.ledger import store
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import ATTEMPTS
from orchestrator.schedule.reconcile import DRIVER_LOG
from orchestrator.settings import service_files

_PAGE_BYTES = 256 << 10


def read_log(
    ledger: Ledger,
    driver_log: Callable[[str], str],
    trial: str,
    attempt: int,
    rank: int,
    offset: int,
) -> LogPage:
    """At most 256 KiB from `offset` on. `driver_log(submission id)` is what Ray has of a driver that still runs."""
    with ledger.reading() as transaction:
        row = store.trial_row(transaction, trial)
        if row is None:
            raise HTTPException(404, f"trial {trial!r}: there is none")
        study = store.study_row(transaction, row["study"])
        assert study is not None
        number = attempt or row["attempts"]
        query = select(ATTEMPTS).where(ATTEMPTS.c.trial == trial, ATTEMPTS.c.number == number)
        tried = transaction.execute(query).mappings().first()
    if tried is None:
        if attempt:
            raise HTTPException(
                404, f"trial {trial}: attempt {attempt} was never started, {row['attempts']} were"
            )
        return LogPage(
            text="", next=offset, done=row["state"] not in ("queued",), attempt=0, rank=rank
        )
    ranks = study["spec"]["resources"]["ranks"]
    if rank >= ranks:
        raise HTTPException(
            404, f"trial {trial}: there is no rank {rank}, it has {ranks}, counted from 0"
        )
    name = (
        DRIVER_LOG.format(attempt=number)
        if rank < 0
        else LOG_FILE.format(attempt=number, rank=rank)
    )
    ended = tried["ended_at"] > 0
    data = service_files(row["folder"]).read_part(name, offset, _PAGE_BYTES)
    if data is None and rank < 0 and not ended:
        data = driver_log(tried["submission_id"]).encode()[offset : offset + _PAGE_BYTES]
    whole = _whole_characters(data or b"")
    done = ended and len(data or b"") < _PAGE_BYTES
    return LogPage(
        text=whole.decode(errors="replace"),
        next=offset + len(whole),
        done=done,
        attempt=number,
        rank=rank,
    )


def _whole_characters(data: bytes) -> bytes:
    """Without a last character of which bytes are still missing."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if length > back else data
    return data
