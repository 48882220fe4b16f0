"""What a trial's identity leaves out of the sources is nothing that runs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.presets import run_preset
from contract.recipe import apply_overrides, parse_run
from orchestrator.study.code_package import installed
from orchestrator.study.meaning.modules import Place, Sources, module_name
from orchestrator.study.meaning.reach import own_meaning

ROOT = Path(__file__).parents[2]
# Python imports this module first in every process.
NOTED = r"""
import os, sys, threading
file, seen = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), set()
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code not in seen:
        seen.add(code)
        os.write(file, f"{code.co_filename}\t{code.co_firstlineno}\t{code.co_qualname}\n".encode())
sys.setprofile(note)
threading.setprofile(note)
"""
# The command `maskray train` runs these beside a trial's own program: it reads a run file, and it
# asks a terminal and a launcher.
OF_THE_COMMAND = {
    *("contract.presets", "contract.run_file", "contract.yaml", "workers.train"),
    *("apply_overrides", "claimed_attempt", "copied", "grace_enforced", "launched_world"),
    *("add_output_options", "parse_run", "signals_asking", "uri_join"),
    "_check_positives",  # of a validator
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param(
            {"model.mask.loss.kind": "softmax", "model.roi.kind": "warp", "loop.ema_decay": 0.9},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tiny", "softmax"],
)
def test_all_that_a_training_calls_is_reached(
    overrides: dict[str, Any], packed: tuple[str, str], tmp_path: Path
) -> None:
    """A training that notes its calls: each is of a definition that the arm reaches."""
    train, val = packed
    (tmp_path / "sitecustomize.py").write_text(NOTED)
    (tmp_path / "run.yaml").write_text(
        f"preset: tiny\ndata: {{train: {train}, val: {val}}}\n"
        "loop: {steps: 2, global_batch: 2, checkpoint_every_steps: 1, eval_boundary: true}\n"
    )
    sets = [part for path, value in overrides.items() for part in ("--set", f"{path}={value}")]
    command = [sys.executable, "-m", "workers.train", str(tmp_path / "run.yaml"), *sets]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--cpus-per-rank", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "NOTES": str(tmp_path / "notes")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    places = {"data.train": train, "data.val": val, **overrides}
    run = parse_run(apply_overrides(run_preset("tiny"), places), "tests")
    reached = own_meaning().of(run).places
    called = set(_called((tmp_path / "notes").read_text()))
    assert len(called) > 300
    missed = {place for place in called - reached if not OF_THE_COMMAND & {*place}}
    assert missed == set()


def _called(notes: str) -> Iterator[Place]:
    """The definitions of the functions and methods that ran."""
    sources = Sources(installed())
    for line in set(notes.splitlines()):
        path, number, name = line.split("\t")
        own = module_name(path.removeprefix(f"{ROOT}/"))
        if not path.startswith(f"{ROOT}/") or own not in sources or name == "<module>":
            continue
        module = sources.module(own)
        assert module is not None
        for given, statements in module.definitions.items():
            if any(_ran(statement, int(number), name) for statement in statements):
                yield module.name, given


def _ran(statement: ast.stmt, line: int, name: str) -> bool:
    """Whether it holds the code that begins at this line.

    Without values and bodies of classes, which are made when their module is imported, and
    validators, which only read a record.
    """
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return False
    first = min([statement.lineno, *(one.lineno for one in statement.decorator_list)])
    if not first <= line <= (statement.end_lineno or 0):
        return False
    for inner in ast.walk(statement):
        if isinstance(inner, ast.ClassDef) and name.endswith(inner.name):
            return False
        if isinstance(inner, ast.FunctionDef) and inner.name in name.split("."):
            words = {ast.unparse(decorator).partition("(")[0] for decorator in inner.decorator_list}
            if words & {"field_validator", "model_validator"}:
                return False
    return True
