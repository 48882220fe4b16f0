"""A small file that a thread replaces, so that a slow disk holds up nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable

from contract.files import Files


class LatestFile:
    """Writes the latest value; one that a newer value overtakes is never written.

    check: raises if the attempt is fenced.
    """

    def __init__(
        self, storage: Files, path: str, check: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._storage, self._path, self._check, self._warn = storage, path, check, warn
        self._value: bytes | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def put(self, value: bytes) -> None:
        with self._changed:
            self._value = value
            self._changed.notify()

    def close(self) -> None:
        """Writes what is left."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._value is not None or self._closed)
                value, self._value = self._value, None
            if value is None:
                return
            try:
                self._check()
                self._storage.write(self._path, value)
            except (OSError, RuntimeError) as error:
                # the next value may get through; a run does not end for its progress file
                self._warn(f"{self._path} could not be written: {error}")
