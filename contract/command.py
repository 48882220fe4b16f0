"""How every command ends: in one line, with exit 2 for a person's mistake and 1 for the world's."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from contract.words import one_line

SUCCESS, WORK_FAILED, INPUT_WRONG = 0, 1, 2


def run_command(command: Callable[[], int], argv: Sequence[str]) -> int:
    """Calls `command`, prints its error as `--json` and `--debug` in `argv` ask, gives its status.

    ValueError and FileNotFoundError are a person's input (exit 2), RuntimeError and other OSErrors
    the world's (exit 1).
    """
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        return _report(error, INPUT_WRONG, argv)
    except (RuntimeError, OSError) as error:
        return _report(error, WORK_FAILED, argv)
    except Exception as error:  # a bug of ours is told like the rest, but not as a person's mistake
        if "--debug" in argv:
            raise
        return _report(
            RuntimeError(f"internal error, {type(error).__name__}: {error}; --debug shows where"),
            WORK_FAILED,
            argv,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_app(app: Any, argv: Sequence[str], program: str) -> int:
    """Runs a typer application on `argv`. To misuse the command line is a person's error too."""
    from typer.exceptions import TyperException

    def command() -> int:
        try:
            status = app(args=list(argv), prog_name=program, standalone_mode=False)
        except TyperException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # typer does not export it
                print(error.format_message(), file=sys.stderr)  # the help
                return INPUT_WRONG
            message = error.format_message().removesuffix(".").replace("Value error, ", "")
            raise ValueError(f"{message}; see {program} --help") from None
        return status if isinstance(status, int) else SUCCESS

    return run_command(command, argv)


def _report(error: BaseException, status: int, argv: Sequence[str]) -> int:
    if "--debug" in argv:
        traceback.print_exception(error)
    else:
        print(f"error: {one_line(error)}", file=sys.stderr)
    if "--json" in argv:
        print(json.dumps({"error": one_line(error)}))
    return status
