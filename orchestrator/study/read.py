"""A study file: read safely, checked as far as that is possible without data, errors in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from contract.metrics import check_metric
from contract.presets import run_preset
from contract.recipe import apply_overrides, parse_run
from contract.record import nearest, parse_record
from contract.study import Study
from contract.yaml import read_yaml

_NAME = re.compile(
    r"[^=,/\x00-\x1f]{1,60}"
)  # factors and levels are joined as "factor=level,factor=level/seed-0"


def read_study(path: Path) -> tuple[Study, str]:
    """The study and the text of its file. Raises ValueError (one line) for whatever a person wrote wrong."""
    data, text = read_yaml(path)
    study = parse_record(Study, data, str(path))
    try:
        check_study(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study, text


def check_study(study: Study) -> None:
    """What one record cannot check alone: names, levels, the paper's table, metric names."""
    if bool(study.baseline.preset) == bool(study.baseline.file):
        raise ValueError("baseline: give either 'preset' or 'file', and one of them")
    for factor, levels in study.factors.items():
        if not levels:
            raise ValueError(f"factors.{factor}: has no levels, so the study would have no trials")
        for name in (factor, *levels):
            if not _NAME.fullmatch(name) or name != name.strip():
                raise ValueError(
                    f"factors.{factor}: the name {name!r} must be 1 to 60 characters without '=', ',' or '/'"
                )
    for metric in study.metrics:
        check_metric(metric)
    tables = paper_tables()
    if study.paper_table and study.paper_table not in tables:
        raise ValueError(
            f"paper_table: no table {study.paper_table!r}; {nearest(study.paper_table, tables)}"
        )
    if study.paper_rows and not study.paper_table:
        raise ValueError("paper_rows: has no effect without paper_table")
    for arm, row in study.paper_rows.items():
        parse_arm(arm, study)
        rows = tables[study.paper_table]["rows"]
        if row not in rows:
            raise ValueError(
                f"paper_rows.{arm}: table {study.paper_table} has no row {row!r}; {nearest(row, rows)}"
            )


def parse_arm(text: str, study: Study) -> dict[str, str]:
    """ "factor=level,factor=level" as a mapping; factors left out match every level. Raises ValueError."""
    arm: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        factor, separator, level = (piece.strip() for piece in part.partition("="))
        if not separator or factor not in study.factors:
            raise ValueError(
                f"paper_rows: {part!r} is not 'factor=level'; {nearest(factor, study.factors)}"
            )
        if level not in study.factors[factor]:
            raise ValueError(
                f"paper_rows: {factor} has no level {level!r}; {nearest(level, study.factors[factor])}"
            )
        arm[factor] = level
    return arm


def paper_tables() -> dict[str, Any]:
    """The paper's tables by their number, as published."""
    text = resources.files("orchestrator").joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)["tables"]
    return tables


# --- the run that a study starts from -------------------------------------------------------------------------------

UNSET = "unset"  # stands for a dataset that nobody has named yet


def baseline_run(study: Study, root: Path) -> dict[str, Any]:
    """The baseline as complete nested data, every default written out. `data.train` may still be UNSET.

    Complete before the overrides: `optimiser.lr: 0.01` needs to know which optimiser it speaks of.
    """
    if study.baseline.preset:
        try:
            run = complete(run_preset(study.baseline.preset), "baseline")
        except ValueError as error:
            raise ValueError(f"baseline.preset: {error}") from None
    else:
        run = read_run(root / study.baseline.file)
    return complete(
        apply_overrides(run, check_paths(study.baseline.set, "baseline.set")), "baseline.set"
    )


def read_run(path: Path) -> dict[str, Any]:
    """A run file as complete nested data; it may name a `preset` beside the fields that it changes."""
    data, _ = read_yaml(path)
    name = data.pop("preset", "")
    try:
        preset = run_preset(str(name)) if name else {}
    except ValueError as error:
        raise ValueError(f"{path}: preset: {error}") from None
    start = complete(preset, str(path))
    return complete(apply_overrides(start, dict(_leaves(data))), str(path))


def complete(run: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`run` with every default written out, as JSON data. Raises ValueError for what does not validate."""
    data = (
        {**run, "data": {"train": UNSET, "val": UNSET, **run.get("data", {})}}
        if _is_open(run)
        else run
    )
    return parse_run(data, where).model_dump(mode="json")


def check_paths(overrides: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`overrides`, if each path could be one. Raises ValueError."""
    for path in overrides:
        if not path or any(not part for part in path.split(".")):
            raise ValueError(f"{where}: {path!r} is not a dotted path like 'model.roi.kind'")
        if path == "seed":
            raise ValueError(f"{where}: seed: a study's seeds stand in its 'seeds'")
    return overrides


def _is_open(run: Mapping[str, Any]) -> bool:
    return isinstance(run.get("data", {}), Mapping)


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        path = f"{prefix}{key}"
        found += (
            _leaves(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
        )
    return found
