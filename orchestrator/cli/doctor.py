"""`maskray doctor`: whether the cluster has what a run over several nodes needs."""

from __future__ import annotations

import typer

from contract.command import SUCCESS, WORK_FAILED
from orchestrator.cli.ids import open_client
from orchestrator.cli.options import AsJson, Debug, print_json


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(json: AsJson = False, debug: Debug = False) -> int:
    """Check on every node what a multi-node run needs; each line passes or says the remedy.
    1 if one does not.
    """
    checks = open_client().examine()
    ok = all(check.ok for check in checks)
    if json:
        print_json({"ok": ok, "checks": [check.model_dump() for check in checks]})
        return SUCCESS if ok else WORK_FAILED
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<10}  {check.found}")
        if check.remedy:
            print(f"{'':18}-> {check.remedy}")
    return SUCCESS if ok else WORK_FAILED
