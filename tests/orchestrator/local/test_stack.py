"""The MLflow server of a folder, where others use the machine too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
import pytest

from orchestrator.ledger.opening import Ledger
from orchestrator.local import stack
from orchestrator.local.processes import own_home
from orchestrator.server import bookkeeping
from orchestrator.server.front.logins import Logins, set_administrator
from orchestrator.server.mlflow import MLflow
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import plan, submission
from tests.orchestrator.waiting import wait_until


def test_a_folder_of_a_service_is_closed_whoever_made_it(tmp_path: Path) -> None:
    home = tmp_path / ".maskray"
    home.mkdir(mode=0o755)  # as `maskray data synth .maskray/demo` does
    own_home(home)
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_local_mlflow_asks_for_a_login_and_each_study_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.ledger.commands import cancel_study
    from orchestrator.server import accept

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
    file = tmp_path / "mlflow-login"
    settings = ServiceSettings(home=str(tmp_path), mlflow_login_file=str(file))
    stack.own_login(settings)
    assert file.stat().st_mode & 0o777 == 0o600
    set_administrator(file)
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    child = stack.ensure_mlflow(settings).child
    try:
        with contextlib.closing(MLflow(child.url)) as mlflow:
            wait_until("MLflow", mlflow.ready, tmp_path / "mlflow.log")
            study, _ = accept.accept(ledger, settings, submission(plan("a")), "ann", 1.0)
            bookkeeping.make_parents(ledger, mlflow)
            logins = Logins(ledger, tmp_path)
            assert not logins.made(study)
            logins.keep(mlflow)
            assert logins.made(study)
            experiment = mlflow.experiment(study, {})
            other = mlflow.experiment("other", {})
            own = tuple(logins.environment(study).values())
            assert os.environ["MLFLOW_TRACKING_PASSWORD"] not in own

            def create(login: tuple[str, ...] | None, where: str) -> int:
                url = f"{child.url}/api/2.0/mlflow/runs/create"
                body = {"experiment_id": where}
                auth = (login[0], login[1]) if login else None
                options = {"json": body, "auth": auth, "trust_env": False, "timeout": 30}
                return httpx.post(url, **options).status_code

            assert create(None, experiment) == 401
            assert create(("admin", "wrong"), experiment) == 401
            assert [create(own, where) for where in (experiment, other)] == [200, 403]
            # a service that comes after this one knows the same password
            assert Logins(ledger, tmp_path).environment(study) == logins.environment(study)
            with ledger.writing() as transaction:
                cancel_study(transaction, study, "ann", 2.0)
            Logins(ledger, tmp_path).keep(mlflow)
            assert create(own, experiment) == 401
    finally:
        stack.end_mlflow(settings)
        ledger.close()
