"""How messages put things: on one line, short, in units that people know."""

from __future__ import annotations

import unicodedata

# Control, direction, half and separator characters: they make a line other than it looks.
_NO_TEXT = ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(error: BaseException) -> str:
    """The message of `error` on one line; its type's name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(value: object) -> str:
    """A value as a message shows it: its beginning, no longer than a line can hold."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def duration(seconds: float) -> str:
    """ "40 s", "25 min", "3.5 h" """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def printable(text: str) -> str:
    """`text` with control characters and halves of characters as escapes that a person can read."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _NO_TEXT and char not in "\n\t"
        else char
        for char in text
    )
