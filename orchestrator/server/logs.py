"""Parts of a rank's or a driver's log, while the attempt runs and after it."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import HTTPException

from contract.answers import LogPage
from contract.attempt import DRIVER_LOG, LOG_FILE
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger
from orchestrator.trial_folder import TrialFolder

_PAGE_BYTES = 256 << 10


def read_log(
    ledger: Ledger,
    driver_log: Callable[[str], str],
    trial: str,
    attempt: int,
    rank: int,
    offset: int,
) -> LogPage:
    """At most 256 KiB from `offset` on. rank -1 is the driver; attempt 0 is the newest.

    driver_log: from a submission id to what Ray has of a driver that still runs.
    """
    with ledger.reading() as transaction:
        row = queries.trial_row(transaction, trial)
        if row is None:
            raise HTTPException(404, f"trial {trial!r}: there is none")
        study = queries.study_row(transaction, row.study)
        assert study is not None
        number = attempt or row.attempts
        tried = queries.attempt_row(transaction, trial, number)
    if tried is None:
        if attempt:
            raise HTTPException(
                404, f"trial {trial}: attempt {attempt} was never started, {row.attempts} were"
            )
        # a queued trial will have a log; one that took its result from another trial never will
        done = row.state != "queued"
        return LogPage(text="", next=offset, done=done, attempt=0, rank=rank)
    ranks = study.spec.resources.ranks
    if rank >= ranks:
        raise HTTPException(
            404, f"trial {trial}: there is no rank {rank}, it has {ranks}, counted from 0"
        )
    driver, ended = rank < 0, tried.ended_at > 0
    name = (DRIVER_LOG if driver else LOG_FILE).format(attempt=number, rank=rank)
    data = TrialFolder(row.folder).read_part(name, offset, _PAGE_BYTES)
    if data is None and driver and not ended:
        # the loop writes the driver's log to the trial's folder when the attempt ends
        data = driver_log(tried.submission_id).encode()[offset : offset + _PAGE_BYTES]
    whole = _whole_characters(data or b"")
    return LogPage(
        text=whole.decode(errors="replace"),
        next=offset + len(whole),
        done=ended and len(data or b"") < _PAGE_BYTES,
        attempt=number,
        rank=rank,
    )


def _whole_characters(data: bytes) -> bytes:
    """`data` without a last character that is cut: a page may end within one."""
    # UTF-8: a character has up to four bytes. All but its first look like 10xxxxxx, the first tells
    # their number.
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if length > back else data
    return data
