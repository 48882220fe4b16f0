"""The text of a report says what the numbers allow, and refuses the rest in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.metrics import mask_inferences
from orchestrator.results.cells import interval_text, points
from orchestrator.results.report import build_report
from orchestrator.results.rescore import SECOND_CHANCE
from tests.orchestrator.results.paper_study import ALIGN, PAPER, POOL, paper_study, table, view
from tests.orchestrator.studies import finished


def test_means_differences_verdict_and_the_papers_row_stand_in_the_table(tmp_path: Path) -> None:
    text = table(view(paper_study(tmp_path), **PAPER))
    rows = [line.split() for line in text.splitlines()]
    assert ["RoIPool", "3", "27.0", "±0.2", "27.0", "±0.2"] in rows
    assert ["RoIAlign", "3", "30.4", "±0.3", "+3.4", "30.4", "±0.3", "+3.4"] in rows
    lines = [" ".join(row) for row in rows]
    answer = "roi=RoIAlign roi=RoIAlign roi=RoIPool mask AP +3.4 +3.1 to +3.6 3 - better"
    assert answer in lines
    assert "roi RoIAlign mask AP75 +3.4 +3.1 to +3.6" in lines  # explored, no verdict
    assert "Scope: on these 5,000 validation images" in text
    assert "160,000 steps, r50-c4. Nothing else was measured." in text
    # 3.37 +- 2.776 * 0.108 * sqrt(2/3 + 2); the weights' source and others are noted, so no AP
    beside = "roi RoIAlign mask AP +3.4 +3.4 +2.9 to +3.9 consistent"
    assert beside in lines
    assert "roi RoIAlign mask AP75 +3.4 +5.1" in lines  # explored: no judgement
    noted = "model.weights is torchvision IMAGENET1K_V1, the paper's is file MSRA's ImageNet"
    assert f"- unlike the paper, in every difference: {noted}" in text
    assert "Machinery only" not in text


def test_one_seed_is_machinery_only(tmp_path: Path) -> None:
    trials = [trial for trial in paper_study(tmp_path) if trial.seed == 0]
    text = table(view(trials, seeds=[0], **PAPER))
    assert (
        "Machinery only: one seed: this shows that the machinery works, "
        "it is no evidence about the arms." in text
    )
    assert "No paper column: one seed." in text
    assert "better" not in text
    assert "30.3 " in text  # our own number stays


def test_a_short_schedule_has_verdicts_that_name_their_scope(tmp_path: Path) -> None:
    trials = [trial.model_copy(update={"storage": ""}) for trial in paper_study(tmp_path)]
    baseline = {"preset": "r50-c4", "set": {"loop.steps": 100}}
    text = table(view(trials, baseline=baseline, **PAPER))
    assert "Scope: on 100 steps, r50-c4. Nothing else was measured." in text
    assert "better" in text
    assert "- no paper column: roi=RoIPool/seed-0: loop.steps is 100, the paper's is 160000" in text


def test_before_the_end_there_are_values_only(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    trials[5] = trials[5].model_copy(update={"state": "running", "metrics": {}})
    report = build_report(view(trials), tmp_path / "report")
    assert "No intervals yet: 1 of 6 trials have not ended." in report.table
    assert "±" not in report.table
    assert "better" not in report.table
    page = report.page.read_text()
    assert 'class="diff better"' not in page
    assert "<h2>Contrasts" not in page


def test_a_run_that_still_learns_is_read_from_its_spool(tmp_path: Path) -> None:
    trials = paper_study(tmp_path, **{"loop.eval_every_steps": 40_000})
    spool = Path(trials[0].storage) / "spool"
    spool.mkdir()
    points = ((80_000, 0.1), (120_000, 0.9), (160_000, 0.9))
    after = ((120_000, 0.2), (160_000, 0.27))
    lines = [{"kind": "metrics", "step": step, "values": {"segm/AP": ap}} for step, ap in points]
    lines.append({"kind": "rewind", "step": 80_000, "at": 0})
    lines += [{"kind": "metrics", "step": step, "values": {"segm/AP": ap}} for step, ap in after]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (spool / "records.jsonl").write_text(text + '{"kind": "met')
    said = "roi=RoIPool/seed-0 is still learning: up 26% over the last quarter of its steps"
    assert f"no verdict on roi=RoIAlign: {said}" in table(view(trials))


def test_trials_that_failed_stay_in_the_table(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    trials[5] = finished(
        ALIGN, 2, state="failed", error="loss is nan at step 9", error_class="diverged"
    )
    text = table(view(trials))
    assert "5 of 6 trials finished (1 failed)" in text
    assert ["RoIAlign", "2", "of", "3*"] in [line.split()[:4] for line in text.splitlines()]
    assert "- roi=RoIAlign/seed-2: diverged: loss is nan at step 9" in text
    assert (
        "no verdict on roi=RoIAlign: roi=RoIAlign/seed-2 diverged; "
        "run it again with maskray retry s1:roi=RoIAlign/seed-2" in text
    )
    assert "- roi=RoIAlign: 1 of 3 trials diverged" in text


def test_a_baseline_without_results_leaves_no_differences(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    trials[:3] = [
        finished(POOL, seed, True, state="failed", error="out of memory") for seed in range(3)
    ]
    text = table(view(trials))
    assert "the baseline arm has no finished trial" in text


def test_a_study_that_just_began_has_a_report(tmp_path: Path) -> None:
    trials = [finished(POOL, 0, True, state="queued"), finished(ALIGN, 0, state="running")]
    text = table(view(trials, seeds=[0]))
    assert "0 of 2 trials finished (1 queued, 1 running)" in text


def test_every_softmax_inference_is_named(tmp_path: Path) -> None:
    metrics = {
        "segm/AP": 0.156,
        "segm-argmax/AP": 0.156,
        "segm-probability/AP": 0.004,
        "segm-versus_background/AP": 0.15,
    }
    text = table(view([finished(POOL, 0, True, metrics=metrics)], seeds=[0]))
    assert ["roi", "RoIPool", "15.6", "0.4", "15.6", "15.0"] in [
        line.split() for line in text.splitlines()
    ]


def test_softmax_inferences_have_no_interval_before_the_end() -> None:
    def metrics(value: float) -> dict[str, float]:
        return {f"segm{name}/AP": value for name in ("", *(f"-{one}" for one in mask_inferences()))}

    trials = [finished(POOL, s, True, metrics=metrics(0.3 + s / 100)) for s in range(3)]
    assert "31.0 ±2.5" in table(view(trials))
    assert "±" not in table(view([*trials, finished(ALIGN, 0, state="running")]))


def test_numbers_that_were_scored_anew_have_no_verdict(tmp_path: Path) -> None:
    built = build_report(view(paper_study(tmp_path)), tmp_path / "report", SECOND_CHANCE)
    assert f"- {SECOND_CHANCE}" in built.table
    assert "roi RoIAlign  mask AP    +3.4  +3.1 to +3.6" in built.table  # to explore
    assert "better" not in built.table
    page = built.page.read_text()
    assert 'class="better"' not in page
    assert "diff better" not in page


def test_points_have_one_decimal_and_no_negative_zero() -> None:
    assert [points(0.1234), points(0.116, True), points(-0.0001, True), points(float("nan"))] == [
        "12.3",
        "+11.6",
        "+0.0",
        "-",
    ]


def test_the_report_names_the_precision_and_a_mixture_of_two(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    # results of an older version do not say it: the run does
    assert "Precision: fp32\n" in table(view(trials))
    for trial in trials:
        result = {"attempt": 1, "precision": "fp32 (convolutions in TF32)"}
        (Path(trial.storage) / "result.json").write_text(json.dumps(result))
    report = build_report(view(trials), tmp_path / "report")
    assert "Precision: fp32 (convolutions in TF32)\n" in report.table
    assert "; precision: fp32 (convolutions in TF32)</p>" in report.page.read_text()
    data = json.loads((report.folder / "report.json").read_text())
    assert data["precision"] == "fp32 (convolutions in TF32)"
    (Path(trials[0].storage) / "result.json").write_text('{"attempt": 1, "precision": "bf16"}')
    mixed = "5 trials in fp32 (convolutions in TF32), 1 trials in bf16: a difference between arms"
    assert f"Precision: {mixed}" in table(view(trials))


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.0503, -0.00037, "-5.0 to -0.04"),  # worse: it must not read as if it held 0
        (0.112, 0.1617, "+11.2 to +16.2"),
        (-0.01, 0.0, "-1.0 to +0.0"),
        (-0.000002, 0.01, "-0.0002 to +1.0"),
    ],
)
def test_an_end_near_zero_shows_its_side(low: float, high: float, text: str) -> None:
    assert interval_text(low, high) == text
