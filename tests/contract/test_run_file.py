"""One reader of run files: `maskray train` and a study's baseline agree on every file."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.recipe import apply_overrides, parse_run
from contract.run_file import complete_run, parse_overrides, read_run_file

PLACES = {"data.train": "t", "data.val": "v"}


def read(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    run = parse_run(apply_overrides(read_run_file(path), PLACES), "run.yaml")
    return run.model_dump(mode="json")


def test_a_file_changes_its_preset_or_the_defaults(tmp_path: Path) -> None:
    run = read(tmp_path, "preset: tiny\nloop: {steps: 7}\nmodel: {roi: {kind: pool}}\n")
    assert run["loop"] == {**complete_run("tiny")["loop"], "steps": 7}
    assert run["model"]["roi"] == {"kind": "pool"}
    # a field of a union's default needs no `kind`: `maskray train` wanted one, a study did not
    assert read(tmp_path, "model: {roi: {samples: 3}}")["model"]["roi"]["samples"] == 3


def test_an_empty_mapping_changes_nothing(tmp_path: Path) -> None:
    """A study refused it, `maskray train` took it."""
    assert read(tmp_path, "preset: tiny\nmodel: {roi: {}}\n") == read(tmp_path, "preset: tiny\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: tiny\nseed: 1\nseed: 2\n", "line 3: seed is given twice"),
        ("preset: tyni\n", "preset: no model preset 'tyni'; did you mean 'tiny'"),
        ("preset: [tiny]\n", "is no name"),
        ("loop: {steps: .inf}\n", "is not a finite number"),
        ("a: !!python/object:os.system {}\n", "YAML tag"),
        ("", "is empty"),
        ("- tiny\n", "expected fields"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        read_run_file(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["a.b=1e-3", "c=[1, 2]", "d=", "e=x=y"]) == {
        "a.b": 0.001,
        "c": [1, 2],
        "d": None,
        "e": "x=y",
    }
    for option in ("a", "a={", "a=!!x y"):
        with pytest.raises(ValueError, match="--set a"):
            parse_overrides([option])
