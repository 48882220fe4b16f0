"""Numbers of arms from files: a table of one's own, a study's report, or the folders of runs.

Needs no service. Every mistake is one line with the file and the place.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract.attempt import RESULT_FILE, SPEC_FILE
from contract.record import nearest
from orchestrator.study.contrasts import arm_name

_COLUMNS = ("arm", "seed", "metric", "value")
_REPORT = "report.json"


@dataclass
class Measured:
    """values: metric -> arm -> seed -> value. reference: the baseline arm, if a file names one.

    lost: arm -> what is missing of it, in words. primary: the metric of a report's verdicts.
    """

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    reference: str = ""
    lost: dict[str, str] = field(default_factory=dict)
    primary: str = ""

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for by_arm in self.values.values() for arm in by_arm))

    def add(self, where: str, arm: str, seed: int, metric: str, value: float) -> None:
        """Raises ValueError for what is no fraction, or is there already with another value."""
        if not math.isfinite(value) or value < 0:
            return  # pycocotools says -1 where there was nothing to evaluate
        if value > 1:
            raise ValueError(f"{where}: {value:g} is no fraction; divide percent by 100")
        by_seed = self.values.setdefault(metric, {}).setdefault(arm, {})
        if by_seed.setdefault(seed, value) != value:
            raise ValueError(
                f"{where}: {arm}, seed {seed}, {metric} is there already, with {by_seed[seed]:g}"
            )


def read_measured(paths: Sequence[Path]) -> Measured:
    """All numbers of all files together."""
    measured = Measured()
    for path in paths:
        folder = path.is_dir()
        file = path / (_REPORT if (path / _REPORT).exists() else RESULT_FILE) if folder else path
        if not file.exists():
            raise ValueError(
                f"{path}: holds neither {_REPORT} nor {RESULT_FILE}"
                if folder
                else f"{path}: no such file"
            )
        if file.suffix.lower() == ".json":
            _add_json(measured, file, path)
        else:
            _add_csv(measured, file)
    if not measured.values:
        raise ValueError(f"{', '.join(map(str, paths))}: holds no number of any metric")
    return measured


# --- a table ------------------------------------------------------------------------------------


def _add_csv(measured: Measured, path: Path) -> None:
    """Other columns are ignored; of a report's own table.csv only finished trials count."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        names = rows.fieldnames or []
        for name in _COLUMNS:
            if name not in names:
                expected = ",".join(_COLUMNS)
                raise ValueError(f"{path}: line 1: no column {name!r}; the head is {expected}")
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            if row.get("state") not in (None, "done"):
                measured.lost[row["arm"]] = f"{row['arm']}, seed {row['seed']} is {row['state']}"
                continue
            if not row["metric"] and "state" in row:
                continue  # a trial without numbers
            seed, value = _number(row, "seed", where), _number(row, "value", where)
            if not math.isfinite(seed) or seed != int(seed):
                raise ValueError(f"{where}: seed {row['seed']!r} is no whole number")
            if not row["arm"] or not row["metric"]:
                raise ValueError(f"{where}: the arm or the metric is empty")
            if not math.isfinite(value):  # it diverged: the arm looks better without it
                seen = f"{row['metric']} {row['value']}"
                measured.lost[row["arm"]] = f"{row['arm']}, seed {int(seed)} has {seen}"
            measured.add(where, row["arm"], int(seed), row["metric"], value)
            if row.get("baseline") == "True":
                measured.reference = row["arm"]


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {column} {row[column]!r} is no number") from None


# --- what maskray wrote -------------------------------------------------------------------------


def _add_json(measured: Measured, file: Path, path: Path) -> None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON: {error}") from None
    try:
        match data:
            case {"arms": arms}:
                _add_report(measured, file, arms)
                _add_withheld(measured, data)
            case {"trials": trials}:
                _add_trials(measured, file, trials)
                _withhold_looks(measured, data)
            case {"metrics": dict(metrics)}:
                _add_run(measured, path, metrics)
            case _:
                raise KeyError("metrics")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: is no report.json, no answer of maskray status --json, and no result.json"
        ) from None


def _add_report(measured: Measured, file: Path, arms: Iterable[Mapping[str, Any]]) -> None:
    for arm in arms:
        name = arm_name(arm["arm"])
        if arm["baseline"]:
            measured.reference = name
        for metric, summary in arm["metrics"].items():
            for seed, value in summary["by_seed"].items():
                measured.add(str(file), name, int(seed), metric, value)
        _note_lost(measured, name, arm["trials"])


def _add_withheld(measured: Measured, report: Mapping[str, Any]) -> None:
    """What the report gives no verdict on, it gives none on here either."""
    # Reports of before these fields have neither.
    measured.primary = measured.primary or report.get("primary", "")
    for answer in report.get("contrasts", ()):
        for arm in answer["weights"] if answer["withheld"] else ():
            measured.lost.setdefault(arm, answer["withheld"])
    _withhold_looks(measured, report)
    if report.get("machinery_only"):
        for arm in measured.arms:
            measured.lost.setdefault(arm, report["machinery_only"])


def _withhold_looks(measured: Measured, study: Mapping[str, Any]) -> None:
    # The interval of a fixed number of seeds does not know of the looks before it.
    for arm in measured.arms if study.get("looks") else ():
        measured.lost.setdefault(arm, "the study looked at its seeds; its report has the verdicts")


def _add_trials(measured: Measured, file: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    for trial in trials:
        name = arm_name(trial["arm"])
        if trial.get("baseline"):
            measured.reference = name
        if trial["state"] == "done":
            for metric, value in trial["metrics"].items():
                if "/" in metric:  # the others are speeds
                    measured.add(str(file), name, trial["seed"], metric, value)
        _note_lost(measured, name, [trial])


def _note_lost(measured: Measured, arm: str, trials: Iterable[Mapping[str, Any]]) -> None:
    for trial in trials:
        if trial["state"] not in ("done", "spared"):
            measured.lost[arm] = f"{arm}, seed {trial['seed']} is {trial['state']}"


def _add_run(measured: Measured, path: Path, metrics: Mapping[str, float]) -> None:
    """A run's arm is its folder's name without the seed at its end."""
    folder = path if path.is_dir() else path.parent
    name, seed = folder.resolve().name, _seed_of(folder)
    # The run's own seed and nothing else: r50 and r101 are two arms.
    arm = re.sub(rf"[-_.]?(?:seed)?[-_.]?(?<!\d)0*{seed}$", "", name) or name
    for metric, value in metrics.items():
        if "/" in metric:
            measured.add(str(path), arm, seed, metric, value)


def _seed_of(folder: Path) -> int:
    attempts = sorted(
        (int(attempt.name) for attempt in folder.glob("attempts/*") if attempt.name.isdecimal()),
        reverse=True,
    )
    for attempt in attempts:
        spec = folder / SPEC_FILE.format(attempt=attempt)
        if spec.exists():
            return int(json.loads(spec.read_text(encoding="utf-8"))["run"].get("seed", 0))
    raise ValueError(f"{folder}: has no {SPEC_FILE.format(attempt=1)}, so its seed is not known")


# --- choices ------------------------------------------------------------------------------------


def chosen(name: str, names: Sequence[str], what: str) -> str:
    """`name`, or the first of `names` if it is empty. Raises ValueError if it is none of them."""
    if name and name not in names:
        raise ValueError(f"--{what}: there is no {name!r}; {nearest(name, names)}")
    return name or names[0]
