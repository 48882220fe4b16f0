"""The code of a study's package expands the study: its fields, its identities, its errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from contract.study import TrialPlan
from orchestrator.study.code_package import PACKAGES, CodePackage, installed_source_hash, package
from orchestrator.study.expand import expand
from orchestrator.travel import expand_with_its_code
from tests.orchestrator.studies import tiny_study, write_dataset

ROOT = Path(__file__).parents[3]
EDITED = "contract/model.py"
NEW_FIELD = "    dilation: int = Field(1, ge=1)  # an arm of one's own\n"
# The last commit before `contract/`: another layout, other module names, records without defaults
# left out. Its packages stay in the storage of every service that ran it.
OLDER = "89a7758"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git tree with our packages as they are."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    subprocess.run(["git", "-C", str(tree), "init", "--quiet"], check=True)
    return tree


@pytest.fixture(scope="module")
def other(tree: Path) -> CodePackage:
    """The package of a working tree in which RoIAlign has a field more."""
    assert package(tree).source_hash == installed_source_hash()
    anchor = "    aligned: bool = True"
    text = (tree / EDITED).read_text()
    assert anchor in text
    (tree / EDITED).write_text(text.replace(anchor, NEW_FIELD + anchor, 1))
    return package(tree)


@pytest.fixture(scope="module")
def older() -> CodePackage:
    try:
        return package(ROOT, OLDER)
    except ValueError as error:
        pytest.skip(f"this clone does not hold commit {OLDER}: {error}")


def test_an_edit_of_the_contract_is_in_the_package(other: CodePackage) -> None:
    assert other.source_hash != installed_source_hash()
    with zipfile.ZipFile(io.BytesIO(other.data)) as archive:
        assert NEW_FIELD in archive.read(EDITED).decode()


def test_a_field_of_ones_own_tree_is_a_field(other: CodePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    study = tiny_study({"dilation": {"one": {}, "two": {"model.roi.dilation": 2}}})
    with pytest.raises(ValueError, match="dilation: no such field"):
        expand(study, data=str(tmp_path), root=ROOT, code=other)
    trials = expand_with_its_code(study, data=str(tmp_path), root=ROOT, code=other).trials
    assert [trial.run["model"]["roi"]["dilation"] for trial in trials] == [1, 2]
    assert [trial.baseline for trial in trials] == [True, False]
    assert trials[0].tags["maskray.sources"] == other.source_hash


def test_its_errors_arrive_as_one_line(other: CodePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    study = tiny_study({"dilation": {"none": {"model.roi.dilation": 0}}})
    with pytest.raises(
        ValueError, match=r"model\.roi\.dilation: Input should be greater .* \(by the code of "
    ) as caught:
        expand_with_its_code(study, data=str(tmp_path), root=ROOT, code=other)
    assert "\n" not in str(caught.value)


def test_our_own_code_expands_here(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    own = package(tmp_path)  # not a tree: the installed sources
    here = expand(tiny_study(), data=str(tmp_path), root=ROOT, code=own)
    assert expand_with_its_code(tiny_study(), data=str(tmp_path), root=ROOT, code=own) == here


# --- packages of another version --------------------------------------------------------------


def test_an_older_package_expands_a_study(older: CodePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    study = tiny_study({"steps": {"few": {"loop.steps": 10}, "many": {}}}, seeds=[0, 3])
    trials = expand_with_its_code(study, data=str(tmp_path), root=ROOT, code=older).trials
    assert [(trial.key, trial.baseline, trial.run["loop"]["steps"]) for trial in trials] == [
        ("steps=few/seed-0", False, 10),
        ("steps=few/seed-3", False, 10),
        ("steps=many/seed-0", True, 400),
        ("steps=many/seed-3", True, 400),
    ]
    assert trials[0].tags["maskray.sources"] == older.source_hash != installed_source_hash()
    wrong = tiny_study({"steps": {"few": {"loop.stepz": 10}}})
    with pytest.raises(ValueError, match=r"did you mean 'steps'\? \(by the code of commit 89a7758"):
        expand_with_its_code(wrong, data=str(tmp_path), root=ROOT, code=older)


OLDER_CLIENT = """
import json, sys
from pathlib import Path
from orchestrator.code import CodePackage
from orchestrator.config import Study
from orchestrator.travel import expand_with_its_code
asked = json.load(sys.stdin)
code = CodePackage(data=Path(asked.pop("zip")).read_bytes(), **asked.pop("code"))
study = Study.model_validate(asked["study"])
made = expand_with_its_code(study, data=asked["data"], root=Path(asked["root"]), code=code)
print(json.dumps([trial.model_dump(mode="json") for trial in made.trials]))
"""


def test_an_older_client_expands_with_our_package(older: CodePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    zipfile.ZipFile(io.BytesIO(older.data)).extractall(tmp_path / "older")
    own = package(tmp_path)
    (tmp_path / "own.zip").write_bytes(own.data)
    study = tiny_study({"roi": {"align": {}, "pool": {"model.roi.kind": "pool"}}})
    asked = {
        "zip": str(tmp_path / "own.zip"),
        "code": {"sha256": own.sha256, "source_hash": own.source_hash, "origin": own.origin},
        "study": study.sparse(),  # the older record does not know the fields that came since
        "data": str(tmp_path / "data"),
        "root": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", OLDER_CLIENT],
        cwd=tmp_path / "older",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "older")},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here = expand(study, data=str(tmp_path / "data"), root=tmp_path, code=own)
    assert [TrialPlan.model_validate(trial) for trial in json.loads(done.stdout)] == [*here.trials]
