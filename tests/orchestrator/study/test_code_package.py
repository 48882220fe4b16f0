"""The code package: the same sources give the same bytes, and nothing else is packed."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from orchestrator.study import code_package as code
from orchestrator.study.code_package import (
    ENTRY_POINTS,
    PACKAGES,
    installed_source_hash,
    package,
    source_hash,
)


def git(tree: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "-C", str(tree), *arguments], check=True, capture_output=True)


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git tree with the shape of ours, one commit."""
    top = tmp_path / "tree"
    for name in PACKAGES:
        (top / name).mkdir(parents=True)
        (top / name / "__init__.py").write_text("")
        (top / name / "arms.py").write_text("")
    for name in ENTRY_POINTS:
        (top / name).write_text("")
    (top / "pyproject.toml").write_text('[project]\nname = "maskray"\n')
    (top / "tests").mkdir()
    (top / "tests" / "test_it.py").write_text("")
    (top / ".gitignore").write_text("secret.py\n")
    git(top, "init", "--quiet")
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message", "one")
    return top


def test_the_same_sources_give_the_same_bytes(tree: Path) -> None:
    first = package(tree)
    (tree / "model" / "arms.py").touch()
    again = package(tree / "model")  # from a folder below
    assert (again.data, again.sha256, again.source_hash) == (
        first.data,
        first.sha256,
        first.source_hash,
    )
    assert len(first.commit) == 40


def test_the_packages_stand_at_the_top_and_tests_stay_home(tree: Path) -> None:
    packed = names(package(tree).data)
    assert {f"{name}/__init__.py" for name in PACKAGES} <= set(packed)
    assert not any(name.startswith("tests/") for name in packed)


def test_untracked_sources_are_packed_and_ignored_files_are_not(tree: Path) -> None:
    (tree / "model" / "arm.py").write_text("new = 1\n")
    (tree / "model" / "secret.py").write_text("ignored\n")
    (tree / ".env").write_text("TOKEN=1\n")
    built = package(tree)
    assert "model/arm.py" in names(built.data)
    assert not {"model/secret.py", ".env"} & set(names(built.data))
    assert built.commit.endswith("-dirty")


def test_a_deleted_file_stays_away(tree: Path) -> None:
    (tree / "model" / "old.py").write_text("")
    git(tree, "add", "model/old.py")
    (tree / "model" / "old.py").unlink()
    assert "model/old.py" not in names(package(tree).data)


def test_only_sources_of_a_run_change_the_source_hash(tree: Path) -> None:
    before = package(tree)
    (tree / "orchestrator" / "page.py").write_text("x = 1\n")
    (tree / "README.md").write_text("words\n")
    git(tree, "add", "README.md")
    after = package(tree)
    assert after.source_hash == before.source_hash
    assert after.sha256 != before.sha256
    (tree / "workers" / "loop.py").write_text("x = 1\n")
    assert package(tree).source_hash != before.source_hash


def test_the_source_hash_knows_names_from_contents() -> None:
    assert source_hash({"model/a.py": b"x"}) != source_hash({"model/b.py": b"x"})
    assert source_hash({"model/a.py": b"x", "tests/t.py": b"y"}) == source_hash(
        {"model/a.py": b"x"}
    )


def test_a_commit_is_packed_as_it_was(tree: Path) -> None:
    before = package(tree)
    (tree / "model" / "arms.py").write_text("changed = 1\n")
    assert package(tree, "HEAD").data == before.data
    assert package(tree).data != before.data


@pytest.mark.parametrize("ref", ["nope", "--output=/tmp/x", "HEAD~9"])
def test_a_ref_that_is_no_commit_is_refused(tree: Path, ref: str) -> None:
    with pytest.raises(ValueError, match="has no such commit"):
        package(tree, ref)


def test_a_link_out_of_the_tree_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "key.py").write_text("secret")
    (tree / "model" / "link.py").symlink_to(tmp_path / "key.py")
    with pytest.raises(ValueError, match="leaves the tree"):
        package(tree)


def test_too_much_is_refused_with_the_largest_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "MAX_MIB", 1)
    (tree / "model" / "table.json").write_text(" " * 2**21)
    with pytest.raises(
        ValueError,
        match=r"2 MiB, at most 1 travel with a study; largest: model/table\.json \(2\.0 MiB\)",
    ):
        package(tree)


def test_elsewhere_the_installed_sources_are_packed(tmp_path: Path) -> None:
    built = package(tmp_path)
    assert built.origin == "installed sources"
    assert built.source_hash == installed_source_hash()
    assert "contract/model.py" in names(built.data)
    assert not any("__pycache__" in name for name in names(built.data))
    with pytest.raises(ValueError, match="so it has no commits"):
        package(tmp_path, "HEAD")


def test_a_foreign_git_tree_is_not_packed(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert package(tmp_path).origin == "installed sources"


def test_a_package_imports_from_its_zip_unpacked(tmp_path: Path) -> None:
    built = package(Path(__file__).parents[3])
    zipfile.ZipFile(io.BytesIO(built.data)).extractall(tmp_path)
    assert all((tmp_path / name / "__init__.py").is_file() for name in PACKAGES)
