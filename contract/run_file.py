"""A run file as a person writes it. `maskray train` and a study's baseline read it here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from contract.presets import run_preset
from contract.recipe import RunConfig, apply_overrides
from contract.yaml import parse_value, read_yaml

_ONLY_A_STUDY = {"baseline", "factors", "seeds", "design", "question"}


def read_run_file(path: Path) -> dict[str, JsonValue]:
    """The file's run as nested data with every default. Datasets that it does not name are absent.

    A file may name a `preset` beside the fields that it changes. Raises ValueError or
    FileNotFoundError, in one line.
    """
    data, _ = read_yaml(path)
    if "baseline" in data and (own := sorted(data.keys() & _ONLY_A_STUDY)):
        raise ValueError(
            f"{path}: is a study, not a run (it has {own[0]!r}); "
            f'"maskray run {path}" runs it with all its trials'
        )
    name = data.pop("preset", "")
    if not isinstance(name, str):
        raise ValueError(f"{path}: preset: {name!r} is no name; write e.g. `preset: tiny`")
    try:
        return merged(complete_run(name), data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def complete_run(preset: str = "") -> dict[str, JsonValue]:
    """A preset, or the default run, with every default written out; it names no datasets.

    Complete, because `model.roi.samples: 3` needs to know which RoI operation it speaks of.
    """
    try:
        start = run_preset(preset) if preset else {}
    except ValueError as error:
        raise ValueError(f"preset: {error}") from None
    places: dict[str, JsonValue] = {"data.train": "unset", "data.val": "unset"}
    run: dict[str, JsonValue] = RunConfig.model_validate(apply_overrides(start, places)).model_dump(
        mode="json"
    )
    data = run["data"]
    assert isinstance(data, dict)
    del data["train"], data["val"]
    return run


def merged(base: Mapping[str, JsonValue], over: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """`base` with the nested fields of `over`; a record of another `kind` replaces all fields."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if (
            isinstance(value, dict)
            and isinstance(old, dict)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def parse_overrides(options: Sequence[str]) -> dict[str, JsonValue]:
    """`PATH=VALUE` options, each value read as YAML. Raises ValueError with the option."""
    overrides: dict[str, JsonValue] = {}
    for option in options:
        path, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--set {option}: has no '='; write --set path=value")
        overrides[path] = parse_value(text, f"--set {option}: the value")
    return overrides
