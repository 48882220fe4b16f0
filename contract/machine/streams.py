"""Standard output and error as the terminal or the pipe behind them takes it."""

from __future__ import annotations

import codecs
import os
import select
import sys
from typing import TextIO

CLOSED_PIPE = 141  # 128 + SIGPIPE: what a shell shows of a program that wrote to a closed pipe

_REPLACED, _BYTES_KEPT = "maskray.replaced", "maskray.replaced-but-bytes"
_IN_ASCII = {"±": "+-", "…": "...", "×": "x", "–": "-", "—": "-", "━": "-", "╸": "-", "╺": "-"}

# How Python keeps a byte of a name that is no text, by PEP 383.
_ESCAPED_BYTES_FROM = 0xDC00
_ESCAPED_BYTES = {chr(_ESCAPED_BYTES_FROM + byte) for byte in range(0x80, 0x100)}


def write_any_text() -> None:
    """Makes the streams write what their encoding lacks in other words: `+-`, or `\\xe9`."""
    codecs.register_error(_REPLACED, _replaced)
    codecs.register_error(_BYTES_KEPT, _replaced_but_bytes)
    for stream in _streams():
        reconfigure = getattr(stream, "reconfigure", None)  # a test's or a notebook's has none
        if reconfigure is not None:
            reconfigure(errors=_BYTES_KEPT if stream.errors == "surrogateescape" else _REPLACED)


def nobody_reads() -> bool:
    """Whether the program at the other end of a stream's pipe has ended, as `head` does."""
    return any(_reader_is_gone(stream) for stream in _streams())


def flush() -> None:
    """Writes what the streams still hold. Raises OSError."""
    for stream in _streams():
        stream.flush()


def flush_or_drop() -> None:
    """As `flush`, but what cannot be written is dropped, so that no flush at exit complains."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """For `codecs`: the text in place of the first character that cannot be written."""
    assert isinstance(error, UnicodeEncodeError)
    char = error.object[error.start]
    if char in _ESCAPED_BYTES:
        return f"\\x{ord(char) - _ESCAPED_BYTES_FROM:x}", error.start + 1
    text = _IN_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode()
    return text, error.start + 1


def _replaced_but_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Likewise, with the bytes of a file's name that is no text as they are: a pipe needs them."""
    assert isinstance(error, UnicodeEncodeError)
    char = error.object[error.start]
    if char in _ESCAPED_BYTES:
        return bytes([ord(char) - _ESCAPED_BYTES_FROM]), error.start + 1
    return _replaced(error)


def _streams() -> list[TextIO]:
    # None in a program that was started with the stream closed
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _reader_is_gone(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are reported without being asked for
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it, or closed
        return False
