"""How every command ends: what a person did wrong is one line and exit 2, what the world did is one line and exit 1."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence

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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


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
