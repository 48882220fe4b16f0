"""How every command ends: in one line, with exit 2 for a person's mistake and 1 for the world's."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from contract.machine import streams
from contract.machine.proxies import ask_this_machine_directly
from contract.words import one_line

SUCCESS, WORK_FAILED, INPUT_WRONG = 0, 1, 2


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The two options that `run_command` reads itself."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def run_command(command: Callable[[], int], argv: Sequence[str]) -> int:
    """Calls `command`, prints its error as `--json` and `--debug` in `argv` ask, gives its status.

    ValueError and FileNotFoundError are a person's input (exit 2), RuntimeError and other OSErrors
    the world's (exit 1). A program whose reader has ended, as in `| head`, ends without a word.
    """
    ask_this_machine_directly()
    streams.write_any_text()
    try:
        status = _run(command, argv)
        streams.flush()  # at exit Python would tell a failure with a traceback
    except OSError as error:
        if streams.nobody_reads():
            status = streams.CLOSED_PIPE
        else:  # a full disk under `> FILE`: not even JSON can be written there
            print(f"error: standard output: {one_line(error)}", file=sys.stderr)
            status = WORK_FAILED
        streams.flush_or_drop()
    return status


def _run(command: Callable[[], int], argv: Sequence[str]) -> int:
    try:
        return command()
    except SystemExit as end:  # argparse's --help, and typer's way to meet a closed pipe
        if streams.nobody_reads():
            raise BrokenPipeError from end
        if isinstance(end.__context__, BrokenPipeError):  # of another pipe or a connection
            return _report(end.__context__, WORK_FAILED, argv)
        return end.code if isinstance(end.code, int) else SUCCESS
    except BrokenPipeError as error:
        if streams.nobody_reads():
            raise
        return _report(error, WORK_FAILED, argv)
    except (ValueError, FileNotFoundError) as error:
        return _report(error, INPUT_WRONG, argv)
    except (RuntimeError, OSError) as error:
        return _report(error, WORK_FAILED, argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a bug of ours is told like the rest, but not as a person's mistake
        if "--debug" in argv:
            raise
        return _report(
            RuntimeError(f"internal error, {type(error).__name__}: {error}; --debug shows where"),
            WORK_FAILED,
            argv,
        )


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
