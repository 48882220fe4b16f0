"""The code that travels expands the study: its fields, its identities, its errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.study.code_package import PACKAGES, CodePackage, installed_source_hash, package
from orchestrator.study.expand import expand
from orchestrator.travel import expand_with_its_code
from tests.orchestrator.studies import tiny_study, write_dataset

ROOT = Path(__file__).parents[3]
NEW_FIELD = "    dilation: int = Field(1, ge=1)  # an arm of one's own\n"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> CodePackage:
    """A working tree in which RoIAlign has a field more."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    config = tree / "contract" / "model.py"
    anchor = "    aligned: bool = True"
    text = config.read_text()
    assert anchor in text
    config.write_text(text.replace(anchor, NEW_FIELD + anchor, 1))
    subprocess.run(["git", "-C", str(tree), "init", "--quiet"], check=True)
    return package(tree)


def test_a_field_of_ones_own_tree_is_a_field(other: CodePackage, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    study = tiny_study({"dilation": {"one": {}, "two": {"model.roi.dilation": 2}}})
    assert other.source_hash != installed_source_hash()
    with pytest.raises(ValueError, match="dilation: no such field"):
        expand(study, data=str(tmp_path), root=ROOT, code=other)
    found = expand_with_its_code(study, data=str(tmp_path), root=ROOT, code=other)
    assert [trial.run["model"]["roi"]["dilation"] for trial in found.trials] == [1, 2]
    assert [trial.baseline for trial in found.trials] == [True, False]
    assert found.trials[0].tags["maskray.sources"] == other.source_hash


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
