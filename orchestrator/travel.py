"""Expanding a study with the code that will run it, which need not be the code of this process.

The fields of a run, and so its identity, are those of the study's package: of another working tree
than the installed one, or of the commit that `--code` names.

The name of this module is part of the wire format: a client of another version starts
`python -m orchestrator.travel` in our package, and we start it in packages of other versions. The
names of the JSON fields are part of it too. A field at its default is not written, and a missing
one has its default: a new field of a study then refuses no older package that does not know it.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from contract.command import INPUT_WRONG, run_command
from contract.machine.folders import scratch
from contract.record import Message, Record, parse_record
from contract.study import Study, TrialPlan
from orchestrator.study.code_package import CodePackage, installed_source_hash
from orchestrator.study.expand import Expansion, expand


class CodeName(Record):
    """A code package without its bytes: the process runs in them."""

    sha256: str
    source_hash: str
    origin: str
    commit: str = ""


class Request(Record):
    """What the other code is asked on its standard input: to expand `study`."""

    study: Study
    data: str = ""
    root: str
    code: CodeName


class Answer(Message):
    """What it prints. The `run` of a trial is whole: only that code knows its defaults."""

    trials: tuple[TrialPlan, ...]
    warnings: tuple[str, ...] = ()


def expand_with_its_code(
    study: Study, *, data: str = "", root: Path, code: CodePackage
) -> Expansion:
    """`expand`, by the sources in `code`: here if they are ours, otherwise in another process.

    Raises ValueError for what that code refuses, RuntimeError if it cannot expand a study at all.
    """
    if code.source_hash == installed_source_hash():
        return expand(study, data=data, root=root, code=code)
    name = CodeName(
        sha256=code.sha256, source_hash=code.source_hash, origin=code.origin, commit=code.commit
    )
    request = Request(study=study, data=data, root=str(root.resolve()), code=name)
    with scratch("code") as folder:
        zipfile.ZipFile(io.BytesIO(code.data)).extractall(folder)
        return _ask(Path(folder), request)


def _ask(folder: Path, request: Request) -> Expansion:
    """The expansion of `request` by the code in `folder`."""
    origin = request.code.origin
    # An older package reads these four fields by name, so they are written at any value.
    question = {
        "study": request.study.sparse(),
        "data": request.data,
        "root": request.root,
        "code": request.code.sparse(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.travel"],
        cwd=folder,
        # First in the path, before the installed packages, which have the same names.
        env={**os.environ, "PYTHONPATH": str(folder)},
        input=json.dumps(question),
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # its words, by a terminal's encoding
        check=False,
    )
    complaint = done.stderr.strip().splitlines() or ["no reason given"]
    if done.returncode == INPUT_WRONG:
        raise ValueError(f"{complaint[-1].removeprefix('error: ')} (by the code of {origin})")
    if done.returncode != 0:
        raise RuntimeError(f"the code of {origin} cannot expand the study: {complaint[-1]}")
    try:
        answer = parse_record(Answer, json.loads(done.stdout), "its answer")
    except ValueError as error:
        raise RuntimeError(f"the code of {origin} cannot expand the study: {error}") from None
    return Expansion(answer.trials, answer.warnings)


def main() -> int:
    """Reads a request on stdin and prints the answer: what `_ask` starts, inside the other code."""
    request = parse_record(Request, json.load(sys.stdin), "request")
    code = CodePackage(data=b"", **dict(request.code))
    expansion = expand(request.study, data=request.data, root=Path(request.root), code=code)
    answer = {
        "trials": [trial.sparse() for trial in expansion.trials],
        "warnings": expansion.warnings,
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
