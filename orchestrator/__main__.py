"""The `maskray` command; `python -m orchestrator` is the same."""

from __future__ import annotations

import sys

from contract.command import run_app
from orchestrator.cli.app import app


def main() -> None:
    sys.exit(run_app(app, sys.argv[1:], "maskray"))


if __name__ == "__main__":
    main()
