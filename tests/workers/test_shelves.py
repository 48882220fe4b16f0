"""The shelves of the room lie on each other: trial, tracking, training, and the programs on top."""

from __future__ import annotations

import pytest

from tests.test_architecture import ROOT, imports, module_of, names, sources

SHELVES = ("trial", "tracking", "training")


def test_every_folder_is_one_of_the_shelves() -> None:
    folders = {path.parent for path in sources("workers")} - {ROOT / "workers"}
    assert {folder.name for folder in folders} == set(SHELVES)


@pytest.mark.parametrize(("level", "shelf"), enumerate(SHELVES))
def test_a_shelf_imports_nothing_from_above(level: int, shelf: str) -> None:
    allowed = {f"workers.{name}" for name in SHELVES[: level + 1]}
    for path in sources(f"workers/{shelf}"):
        modules = names(imports(path), "workers") - {"workers"}
        above = {
            name for name in modules if not any(names({name}, permitted) for permitted in allowed)
        }
        assert not above, module_of(path)
