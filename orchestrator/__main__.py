"""The `maskray` command; `python -m orchestrator` is the same."""

from __future__ import annotations

import sys

from orchestrator.cli.app import app
from pipelines.console import run_app


def main() -> None:
    sys.exit(run_app(app, sys.argv[1:], "maskray"))


if __name__ == "__main__":
    main()
