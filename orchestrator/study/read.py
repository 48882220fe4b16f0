"""A study file: read safely and checked as far as that is possible without data."""

from __future__ import annotations

import re
from pathlib import Path

from contract.metrics import check_metric
from contract.record import nearest, parse_record
from contract.study import Study, check_gpus
from contract.yaml import read_yaml
from orchestrator.study.contrasts import check_forms, parse_arm
from orchestrator.study.paper import paper_tables

# A trial's key joins factors and levels as "factor=level,factor=level/seed-0".
_NAME = re.compile(r"[^=,/\x00-\x1f]{1,60}")


def read_study(path: Path) -> tuple[Study, str]:
    """The study and the text of its file. Raises ValueError of one line for a mistake in it."""
    data, text = read_yaml(path)
    study = parse_record(Study, data, str(path))
    try:
        check_study(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study, text


def check_study(study: Study) -> None:
    """Checks names, levels, metrics, GPUs and the paper's table, which no field checks alone."""
    if bool(study.baseline.preset) == bool(study.baseline.file):
        raise ValueError("baseline: give either 'preset' or 'file', and one of them")
    for factor, levels in study.factors.items():
        if not levels:
            raise ValueError(f"factors.{factor}: has no levels, so the study would have no trials")
        for name in (factor, *levels):
            # Spaces at the ends would make two names that a reader cannot tell apart.
            if not _NAME.fullmatch(name) or name != name.strip():
                raise ValueError(
                    f"factors.{factor}: the name {name!r} must be 1 to 60 characters "
                    "without '=', ',' or '/'"
                )
    for metric in study.metrics:
        check_metric(metric)
    check_gpus(study.resources)
    check_forms(study)
    for arm, numbers in study.calibration.items():
        parse_arm(arm, study.factors, "calibration")
        for metric in numbers:
            check_metric(metric, f"calibration.{arm}")
    _check_paper(study)


def _check_paper(study: Study) -> None:
    tables = paper_tables()
    if study.paper_table and study.paper_table not in tables:
        raise ValueError(
            f"paper_table: no table {study.paper_table!r}; {nearest(study.paper_table, tables)}"
        )
    if study.paper_rows and not study.paper_table:
        raise ValueError("paper_rows: has no effect without paper_table")
    for arm, row in study.paper_rows.items():
        parse_arm(arm, study.factors, "paper_rows")
        rows = tables[study.paper_table].rows
        if row not in rows:
            raise ValueError(
                f"paper_rows.{arm}: table {study.paper_table} has no row {row!r}; "
                f"{nearest(row, rows)}"
            )
