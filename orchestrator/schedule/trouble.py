"""One trial's trouble stops no other trial, and is told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

from contract.words import one_line
from orchestrator.cluster.jobs import JobRefusedError, UnreachableError
from orchestrator.ledger.opening import LedgerError, is_down, reason

LOG = logging.getLogger("maskray")


class Troubles:
    """What the loop could not do for single trials, in words that `maskray status` shows."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._noted: set[str] = set()  # in the look at the trial that is going on

    @property
    def words(self) -> Mapping[str, str]:
        """By trial; a copy, because requests read it while the loop writes."""
        return dict(self._words)

    def keep(self, trials: Set[str]) -> None:
        """Forgets all others."""
        self._words = {trial: words for trial, words in self._words.items() if trial in trials}

    def note(self, trial: str, words: str) -> None:
        LOG.warning("trial %s: %s", trial, words)
        self._noted.add(trial)
        self._words = {**self._words, trial: words}

    @contextmanager
    def apart(self, trial: str) -> Iterator[None]:
        """The block may fail for what is this trial's own. The next turn looks at it again.

        An error of Ray or of the database is everybody's, and is raised.
        """
        self._noted.discard(trial)
        try:
            yield
        except UnreachableError as error:
            if not isinstance(error, JobRefusedError):
                raise
            self.note(trial, f"{one_line(error)}; looked at again")
        except LedgerError as error:
            if is_down(error):
                raise
            self.note(trial, f"the ledger refuses it ({reason(error)}); looked at again")
        except (OSError, ValueError) as error:
            self.note(trial, f"{one_line(error)}; looked at again")
        except Exception as error:
            # Nobody foresaw it, and nobody may wait for it.
            LOG.exception("trial %s", trial)
            self.note(trial, f"{type(error).__name__}: {one_line(error)}; looked at again")
        if trial not in self._noted and trial in self._words:
            self._words = {name: text for name, text in self._words.items() if name != trial}
