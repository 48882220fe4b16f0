"""An MLflow login for each study: its trials may write that study's experiment and see no other.

The service itself has an administrator's login, which no trial gets.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from contract.machine.logins import NAME, PASSWORD, login_in
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger
from orchestrator.local.processes import check_private, own_token
from orchestrator.server.bookkeeping import apart
from orchestrator.server.mlflow import MLflow


class Logins:
    """Makes logins, and removes those of studies that are over. One thread calls `keep`."""

    def __init__(self, ledger: Ledger, home: Path) -> None:
        self._ledger = ledger
        # Passwords are computed from a key, so nothing has to keep them.
        self._key = own_token(home / "mlflow-logins-key").encode()
        # Several services may share a server: each removes its own users only.
        self._prefix = f"study-{ledger.name()}-"
        self._made: set[str] = set()  # names
        # by a service before this one, which may have died; None until the server was asked
        self._left: set[str] | None = None

    def keep(self, mlflow: MLflow) -> None:
        """Raises TrackingDownError where the server does not answer; the next call goes on."""
        with self._ledger.reading() as transaction:
            studies = queries.open_studies(transaction)
        names = {self._prefix + study.id: study for study in studies.values()}
        if self._left is None:
            self._left = {name for name in mlflow.users() if name.startswith(self._prefix)}
        over = (self._left | self._made) - names.keys()
        for name in over:
            with apart(f"MLflow's user {name}"):
                mlflow.remove_user(name)
                self._made.discard(name)
                self._left.discard(name)
        for name, study in names.items():
            # only then has it an experiment
            if study.mlflow_run_id and name not in self._made:
                with apart(f"MLflow's user {name}"):
                    experiment = mlflow.experiment(study.mlflow_experiment, {})
                    mlflow.keep_user(name, self._password(name), experiment)
                    self._made.add(name)

    def made(self, study: str) -> bool:
        return self._prefix + study in self._made

    def environment(self, study: str) -> dict[str, str]:
        """What a trial of this study logs in with."""
        name = self._prefix + study
        return {NAME: name, PASSWORD: self._password(name)}

    def _password(self, name: str) -> str:
        return hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()


def administrator(path: Path) -> Mapping[str, str]:
    """The login in a file of USER:PASSWORD, as variables. Raises ValueError for another form."""
    user, password = login_in(path)
    check_private(path)
    return {NAME: user, PASSWORD: password}


def set_administrator(path: Path) -> None:
    """The service's own requests, and `workers.sync` that it spawns, log in with this."""
    os.environ |= administrator(path)
