"""Reads COCO JSON of any size piece by piece: memory holds one record, not the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.coco.records import JsonValue

CHUNK_CHARS = 1 << 20  # read at a time
_SPACE = " \t\r\n"
_LISTS = ("images", "annotations", "categories")


def read_coco(path: Path) -> Iterator[tuple[str, JsonValue, str]]:
    """Yields (key, value, its text) for each element of the lists, and for each other value.

    These are the lists and values of the file's outermost object. Raises ValueError, which names
    the file, if it is not COCO JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --annotations a COCO JSON file")
    seen = set()
    with path.open(encoding="utf-8-sig") as source:  # some tools write a byte-order mark
        try:
            for key, value, text in _top_level(_Window(source)):
                seen.add(key.removeprefix("end of "))
                yield key, value, text
        except (ValueError, RecursionError, _NotCocoError) as error:
            raise ValueError(
                f"{path}: not COCO JSON ({error}); is it the right file, and whole?"
            ) from None
    for key in _LISTS:
        if key not in seen:
            raise ValueError(
                f"{path}: not COCO JSON (no list {key!r}); results files and captions are not "
                "packed"
            )


class _NotCocoError(Exception):
    """JSON, or the beginning of JSON, that is not laid out as COCO's."""


class _Window:
    """A sliding piece of the text. `position` is where reading goes on."""

    def __init__(self, source: IO[str]):
        self._source = source
        self._decoder = json.JSONDecoder()
        self.text, self.position = "", 0

    def grow(self) -> bool:
        """Drops what was read and appends more; False at the end of the file."""
        # At least twice the unread text: a long value is parsed again after each piece, and so the
        # time stays in proportion to its length.
        piece = self._source.read(max(CHUNK_CHARS, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not space, or nothing at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if not self.grow():
                return ""

    def take(self, expected: str) -> None:
        character = self.peek()
        if character != expected or not character:
            raise _NotCocoError(f"expected {expected!r}, found {character or 'the end'!r}")
        self.position += 1

    def value(self) -> tuple[JsonValue, str]:
        """The next JSON value and its text. Reads on while the value may go on after the window."""
        self.peek()
        while True:
            # A value that the window cuts off is an error too; more text tells the two apart.
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                if not self.grow():
                    raise
                continue
            ended = isinstance(value, dict | list | str) or self.text[end : end + 1] in tuple(
                ",]}" + _SPACE
            )
            if not ended and self.grow():
                continue  # a number may go on in the next piece
            text = self.text[self.position : end]
            self.position = end
            return value, text


def _top_level(window: _Window) -> Iterator[tuple[str, JsonValue, str]]:
    window.take("{")
    if window.peek() == "}":
        return
    while True:
        key, _ = window.value()
        window.take(":")
        if key in _LISTS:
            if window.peek() != "[":
                raise _NotCocoError(f"{key!r} is not a list")
            yield from ((key, value, text) for value, text in _elements(window))
            yield f"end of {key}", None, ""  # an empty list shows only here
        else:
            yield str(key), *window.value()
        if window.peek() != ",":
            break
        window.take(",")
    window.take("}")
    if window.peek():
        raise _NotCocoError(f"it goes on after its end, with {window.peek()!r}")


def _elements(window: _Window) -> Iterator[tuple[JsonValue, str]]:
    window.take("[")
    if window.peek() == "]":
        window.take("]")
        return
    while True:
        yield window.value()
        if window.peek() != ",":
            break
        window.take(",")
    window.take("]")
