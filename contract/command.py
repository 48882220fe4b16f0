"""How every command ends: what a person did wrong is one line and exit 2, what the world did is one line and exit 1."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

SUCCESS, WORK_FAILED, INPUT_WRONG = 0, 1, 2


def run_command(command: Callable[[], int], argv: Sequence[str]) -> int:
    """Calls `command` and returns its exit status; prints errors as the flags `--json` and `--debug` in `argv` ask.

    ValueError and FileNotFoundError are a person's input (exit 2), RuntimeError and other OSErrors the world's (1).
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
    """Runs a typer application on `argv`; misuse of the command line is a person's error like any other."""
    from typer.exceptions import TyperException

    def command() -> int:
        try:
            status = app(args=list(argv), prog_name=program, standalone_mode=False)
        except TyperException as error:
            if (
                type(error).__name__ == "NoArgsIsHelpError"
            ):  # typer does not export it; its message is the help
                print(error.format_message(), file=sys.stderr)
                return INPUT_WRONG
            message = error.format_message().removesuffix(".").replace("Value error, ", "")
            raise ValueError(f"{message}; see {program} --help") from None
        return status if isinstance(status, int) else SUCCESS

    return run_command(command, argv)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line; pydantic's are expected to have been explained by then."""
    return " ".join(str(error).split()) or type(error).__name__


def _report(error: BaseException, status: int, argv: Sequence[str]) -> int:
    if "--debug" in argv:
        traceback.print_exception(error)
    else:
        print(f"error: {one_line(error)}", file=sys.stderr)
    if "--json" in argv:
        print(json.dumps({"error": one_line(error)}))
    return status
