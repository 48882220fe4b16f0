"""Expanding a study with the code that will run it, which need not be the code of this process.

The fields of a run, and so its identity, are those of the package that travels: of another working tree than the
installed one, or of the commit that `--code` names.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from contract.command import INPUT_WRONG, run_command
from contract.record import parse_record
from contract.study import Study, TrialPlan
from orchestrator.study.code_package import CodePackage, installed_source_hash
from orchestrator.study.expand import Expansion, expand


def expand_with_its_code(
    study: Study, *, data: str = "", root: Path, code: CodePackage
) -> Expansion:
    """`expand`, by the sources in `code`: here if they are the same as ours, otherwise in a process of their own."""
    if code.source_hash == installed_source_hash():
        return expand(study, data=data, root=root, code=code)
    request = {
        "study": study.model_dump(mode="json"),
        "data": data,
        "root": str(root.resolve()),
        "code": {
            "sha256": code.sha256,
            "source_hash": code.source_hash,
            "origin": code.origin,
            "commit": code.commit,
        },
    }
    with tempfile.TemporaryDirectory(prefix="maskray-code-") as folder:
        zipfile.ZipFile(io.BytesIO(code.data)).extractall(folder)
        return _ask(Path(folder), request, code.origin)


def _ask(folder: Path, request: dict[str, Any], origin: str) -> Expansion:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.travel"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == INPUT_WRONG:
        raise ValueError(
            f"{done.stderr.strip().splitlines()[-1].removeprefix('error: ')} (by the code of {origin})"
        )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"the code of {origin} cannot expand the study: {reason}")
    answer = json.loads(done.stdout)
    trials = tuple(TrialPlan.model_validate(trial) for trial in answer["trials"])
    return Expansion(trials, tuple(answer["warnings"]))


def main() -> int:
    """Reads a request on stdin and prints the expansion: what `_ask` starts, inside the other code."""
    request = json.load(sys.stdin)
    code = CodePackage(data=b"", **request["code"])
    study = parse_record(Study, request["study"], "study")
    found = expand(study, data=request["data"], root=Path(request["root"]), code=code)
    print(
        json.dumps(
            {
                "trials": [trial.model_dump(mode="json") for trial in found.trials],
                "warnings": found.warnings,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
