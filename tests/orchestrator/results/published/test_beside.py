"""The paper's numbers stand beside a study's own where its records earn them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.cells import metric_label
from orchestrator.results.looks import verdicts_of
from orchestrator.results.report import Contents, build_report
from orchestrator.study.paper import paper_tables
from tests.orchestrator.results.paper_study import (
    ALIGN,
    PAPER,
    POOL,
    paper_study,
    paper_trial,
    table,
    view,
)
from tests.orchestrator.studies import finished


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": "79"}, "the validation set has 79 images, the paper's has 5,000"),
        ({"images": ""}, "the validation set is of unknown size, the paper's has 5,000"),
        (
            {"model.image.short_side_px": 512},
            "model.image.short_side_px is 512, the paper's is 800",
        ),
        ({"loop.steps": 80_000}, "loop.steps is 80000, the paper's is 160000"),
    ],
)
def test_numbers_that_cannot_be_compared_with_the_papers_are_not(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    study = view(paper_study(tmp_path, **options), **PAPER)
    text = table(study)
    assert f"No paper column: roi=RoIPool/seed-0: {said} (and 5 more, in the notes)." in text
    assert f"- no paper column: roi=RoIAlign/seed-2: {said}" in text
    assert "Beside the paper" not in text
    assert "better" in text  # against each other the arms still can be
    # What is left is the direction, outside of the column.
    assert "- roi=RoIAlign: same direction as the paper's +3.4 mask AP" in text
    folder = build_report(study, tmp_path / "report").folder
    data = json.loads((folder / "report.json").read_text())
    (one,) = data["paper"]["contrasts"]
    assert (one["direction"], one["judgement"], one["low"]) == ("same direction", "", None)
    assert data["arms"][1]["paper"] == {}


def test_trials_that_never_ran_bar_no_column_of_the_paper(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    spared = [
        finished(arm, 3, arm == POOL, state=state, attempts=0)
        for arm, state in ((POOL, "cancelled"), (ALIGN, "spared"))
    ]
    assert "paper +3.4: consistent" in table(view([*trials, *spared], **PAPER))
    assert "No paper column: no finished trial." in table(view(spared, **PAPER))


def test_the_range_for_one_seed_is_that_of_the_first_verdict(tmp_path: Path) -> None:
    trials = [one.model_copy(update={"identity": one.key}) for one in paper_study(tmp_path)]
    first = view(trials, **PAPER)
    verdicts = list(verdicts_of(first, Contents.of(first).comparison, 1.0))
    more = [
        paper_trial(tmp_path, arm, 3, ap).model_copy(update={"identity": f"{ap}"})
        for arm, ap in ((POOL, 0.25), (ALIGN, 0.33))
    ]
    study = view([*trials, *more], **PAPER).model_copy(update={"verdicts": verdicts})
    lines = [" ".join(line.split()) for line in table(study).splitlines()]
    assert any(line.endswith("+3.4 +2.9 to +3.9 consistent") for line in lines)
    said = "RoIAlign +3.4 mask AP [3.1, 3.6], better (first, 3 seeds); paper +3.4"
    assert f"{said}: consistent" in lines
    # A verdict of an older version does not say how far its interval reaches.
    old = [one.model_copy(update={"quantile": None, "df": 0.0}) for one in verdicts]
    lines = table(study.model_copy(update={"verdicts": old})).splitlines()
    assert said in lines
    assert any(line.split()[-2:] == ["-", "-"] for line in lines)


def test_the_papers_gain_alone_is_a_gain(tmp_path: Path) -> None:
    fields = {"paper_table": "text-fpn-align", "paper_rows": {"roi=RoIAlign": "difference"}}
    trials = paper_study(tmp_path, preset="r50-fpn")
    text = table(view(trials, baseline={"preset": "r50-fpn"}, **fields))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # Seeds of sd 0.11 do not reach from +3.4 to +1.5.
    assert "roi RoIAlign mask AP +3.4 +1.5 +2.9 to +3.9 contradicts" in lines
    assert "RoIAlign +3.4 mask AP [3.1, 3.6], better; paper +1.5: contradicts" in lines


@pytest.mark.parametrize(("value", "missed"), [(27.2, 0), (28.0, 1)])
def test_a_public_number_that_is_missed_discredits_absolute_ap(
    tmp_path: Path, value: float, missed: int
) -> None:
    public = {"roi=RoIPool": {"segm/AP": {"value": value, "band": 0.2}}}
    report = build_report(view(paper_study(tmp_path), calibration=public), tmp_path / "report")
    text = report.table
    result = ["roi", "RoIPool", "mask", "AP", "27.0", f"{value}", "±0.2"]
    assert [*result, "outside" if missed else "inside"] in [x.split() for x in text.splitlines()]
    said = "- 1 of 1 public numbers are missed by more than their band: do not believe absolute AP"
    assert (said in text) == bool(missed)
    (one,) = json.loads((report.folder / "report.json").read_text())["calibration"]
    assert one["inside"] != bool(missed)
    assert "Calibration against public numbers" in report.page.read_text()


def test_paper_metrics_have_our_names() -> None:
    tables = paper_tables()
    assert tables["2d"].row("RoIPool").metrics["bbox/AP75"] == pytest.approx(0.269)
    assert tables["5"].row("mask only").metrics == pytest.approx(
        {"bbox/AP": 0.536, "segm/AP": 0.458}
    )
    assert tables["6"].row("RoIAlign").metrics["keypoints/APl"] == pytest.approx(0.73)
    assert metric_label("segm-argmax/AP") == "mask AP (argmax)"
