"""The report says what the numbers allow, refuses the rest in words, and is safe to open."""

from __future__ import annotations

import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from contract.answers import AttemptView, StudyView, TrialView
from orchestrator.results.cells import metric_label, points
from orchestrator.results.details.origin import cost_table, provenance
from orchestrator.results.details.slices import classes
from orchestrator.results.plots.curves import smooth
from orchestrator.results.plots.style import colours
from orchestrator.results.report import Contents, Report, build_report
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.paper import paper_tables
from tests.orchestrator.studies import finished, tiny_study

POOL, ALIGN = {"roi": "RoIPool"}, {"roi": "RoIAlign"}
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "roi": {"RoIPool": {"model.roi.kind": "pool"}, "RoIAlign": {"model.roi.kind": "align"}}
}
PAPER = {
    "paper_table": "2c",
    "paper_rows": {"roi=RoIPool": "RoIPool", "roi=RoIAlign": "RoIAlign-ave"},
}
POOL_AP, ALIGN_AP = (0.270, 0.271, 0.269), (0.303, 0.305, 0.303)


def view(trials: list[TrialView], **fields: Any) -> StudyView:
    study = tiny_study(FACTORS, **({"baseline": {"preset": "r50-c4"}, "seeds": [0, 1, 2]} | fields))
    return StudyView(
        study="s-1",
        name=study.name,
        owner="ada",
        state="done",
        priority=0,
        created_at=0.0,
        storage="",
        spec=study.model_dump(mode="json"),
        trials=trials,
    )


def paper_trial(
    tmp_path: Path,
    arm: dict[str, str],
    seed: int,
    ap: float,
    images: str = "5000",
    preset: str = "r50-c4",
    **run: Any,
) -> TrialView:
    """A finished trial in the paper's recipe, with the folder that it leaves."""
    folder = tmp_path / f"{arm['roi']}-{seed}"
    (folder / "attempts" / "1").mkdir(parents=True)
    kind = FACTORS["roi"][arm["roi"]]
    overrides = {"preset": preset, "set": {"model.inference.nms_iou": 0.3, **kind, **run}}
    config = BaselineRun.of(tiny_study(baseline=overrides), tmp_path).run
    tags = {"maskray.train_images": "118287", "maskray.val_images": images}
    spec = {"run": config.model_dump(mode="json"), "tags": tags}
    (folder / "attempts" / "1" / "spec.json").write_text(json.dumps(spec))
    (folder / "result.json").write_text(json.dumps({"attempt": 1, "artifacts": {}}))
    return finished(
        arm, seed, arm == POOL, storage=str(folder), metrics={"segm/AP": ap, "segm/AP75": ap}
    )


def paper_study(tmp_path: Path, **options: Any) -> list[TrialView]:
    pool = [paper_trial(tmp_path, POOL, seed, ap, **options) for seed, ap in enumerate(POOL_AP)]
    return pool + [
        paper_trial(tmp_path, ALIGN, seed, ap, **options) for seed, ap in enumerate(ALIGN_AP)
    ]


def table(study: StudyView) -> str:
    return Contents.of(study).text()


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
    beside = "roi RoIAlign mask AP - - +3.4 +3.4 +2.9 to +3.9 consistent"
    assert beside in lines
    assert "roi RoIAlign mask AP75 - - +3.4 +5.1" in lines  # explored: no judgement
    noted = "model.weights is torchvision IMAGENET1K_V1, the paper's is file MSRA's ImageNet"
    assert f"- unlike the paper, in every difference: {noted}" in text
    assert "Machinery only" not in text


def test_each_contrast_has_a_headline_with_the_papers_difference(tmp_path: Path) -> None:
    """The paper's table 2c: RoIAlign 30.2 or 30.3, RoIPool 26.9, so +3.4; ours is +3.37."""
    contents = Contents.of(view(paper_study(tmp_path), **PAPER))
    line = "RoIAlign +3.4 mask AP [3.1, 3.6], better; paper +3.4: consistent"
    assert line in contents.text().splitlines()
    assert json.loads(contents.rendered("json"))["headlines"] == [line]
    page = contents.rendered("html").decode()
    assert f'<li class="better">{line}</li>' in page
    assert page.index(line) < page.index("the paper&#x27;s difference".replace("&#x27;", "'"))
    assert page.index("the paper's difference") < page.index("<h2>Arms")
    # without the paper's recipe nothing is said of the paper
    plain = Contents.of(view(paper_study(tmp_path / "b", images="79"), **PAPER)).text()
    assert "RoIAlign +3.4 mask AP [3.1, 3.6], better\n" in plain


def test_markdown_and_latex_escape_what_a_person_wrote(tmp_path: Path) -> None:
    question = "50% | <b>_x_</b> & #1?"
    contents = Contents.of(view(paper_study(tmp_path), question=question, **PAPER))
    marked, tex = (contents.rendered(form).decode() for form in ("md", "latex"))
    assert marked.startswith("50% \\| &lt;b&gt;\\_x\\_&lt;/b&gt; &amp; \\#1?\n\n- **RoIAlign +3.4")
    assert "| RoIAlign | 3 | 30.4 ±0.3 | +3.4 | 30.4 ±0.3 | +3.4 |" in marked
    assert r"RoIAlign & 3 & 30.4 $\pm$0.3 & +3.4 & 30.4 $\pm$0.3 & +3.4 \\" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    assert contents.rendered("png").startswith(b"\x89PNG")


def test_a_narrow_screen_names_the_column_of_every_cell(tmp_path: Path) -> None:
    page = Contents.of(view(paper_study(tmp_path), **PAPER)).rendered("html").decode()
    assert '<td role="cell" class="better" data-head="verdict">better</td>' in page
    assert '<td role="cell" data-head="95% interval">+3.1 to +3.6</td>' in page
    assert '<th role="rowheader" scope="row" class="name" data-head="roi">RoIAlign</th>' in page


def test_an_arm_has_one_colour_in_every_plot(tmp_path: Path) -> None:
    trials = paper_study(tmp_path, **{"loop.eval_every_steps": 80_000})
    for trial in trials:
        spool = Path(trial.storage) / "spool"
        spool.mkdir()
        lines = [
            json.dumps({"kind": "metrics", "step": step, "values": {"segm/AP": 0.2}})
            for step in (80_000, 160_000)
        ]
        (spool / "records.jsonl").write_text("\n".join(lines))
    contents = Contents.of(view(trials, **PAPER))
    assert colours(contents.comparison.arms) == {
        "roi=RoIPool": "#e0813a",
        "roi=RoIAlign": "#3b82c4",
    }
    page = contents.rendered("html").decode()
    for title in ("Differences", "mask AP of every arm", "mask AP, points, by step"):
        drawing = page.partition(f'aria-label="{title}">')[2].partition("</svg>")[0]
        assert "#3b82c4" in drawing, title
    assert "000<" not in drawing  # ticks of a long run stay short: 120k


def test_what_a_study_cost_and_where_it_comes_from_stand_on_the_page(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    attempt = AttemptView(
        number=1, state="done", submission_id="s", started_at=3600.0, ended_at=5400.0
    )
    trials[3] = trials[3].model_copy(update={"attempts": 2, "attempt_list": [attempt, attempt]})
    contents = Contents.of(view(trials, resources={"ranks": 2, "gpus_per_rank": 1}, **PAPER))
    rows = [
        [cell.text for cell in row.cells]
        for row in cost_table(contents.facts, contents.comparison).rows
    ]
    assert rows == [["roi RoIPool", "0.00", "-", "0", "0"], ["roi RoIAlign", "2.00", "-", "1", "0"]]
    known = dict(provenance(contents.view, contents.facts))
    assert known["last trial ended"] == "1970-01-01 01:30 UTC"
    assert known["one trial again, compared"] == "maskray reproduce s-1:KEY"


def test_only_classes_beyond_their_seeds_are_shown(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    for trial, cat in zip(trials, (0.1, 0.11, 0.09, 0.3, 0.31, 0.29), strict=True):
        result = {"attempt": 1, "per_class": {"segm/AP": {"cat": cat, "dog": 0.2, "void": -1}}}
        (Path(trial.storage) / "result.json").write_text(json.dumps(result))
    contents = Contents.of(view(trials))
    found = classes(contents.facts, contents.comparison)
    assert found.table is not None
    assert [[cell.text for cell in row.cells] for row in found.table.rows] == [
        ["roi RoIAlign", "cat", "+20.0", "+20.0 to +20.0"]
    ]
    assert found.note.startswith("1 of 2 differences by class")


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


def test_the_papers_gain_alone_is_a_gain(tmp_path: Path) -> None:
    fields = {"paper_table": "text-fpn-align", "paper_rows": {"roi=RoIAlign": "difference"}}
    trials = paper_study(tmp_path, preset="r50-fpn")
    text = table(view(trials, baseline={"preset": "r50-fpn"}, **fields))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # Seeds of sd 0.11 do not reach from +3.4 to +1.5.
    assert "roi RoIAlign mask AP - - +3.4 +1.5 +2.9 to +3.9 contradicts" in lines
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


def test_points_have_one_decimal_and_no_negative_zero() -> None:
    assert [points(0.1234), points(0.116, True), points(-0.0001, True), points(float("nan"))] == [
        "12.3",
        "+11.6",
        "+0.0",
        "-",
    ]


# --- files ------------------------------------------------------------------------------------


def built(tmp_path: Path) -> Report:
    hostile = "<script>alert(1)</script>"
    trials = paper_study(tmp_path)
    folder = Path(trials[0].storage)
    (folder / "artifacts").mkdir()
    parquet.write_table(
        pa.table({"step": [0, 1, 2], "loss": [3.0, 2.0, None]}),
        folder / "artifacts" / "series.parquet",
    )
    Image.new("RGB", (8, 8), "red").save(folder / "artifacts" / "p.png")
    artifacts = {"series": "artifacts/series.parquet", "picture/last": "artifacts/p.png"}
    (folder / "result.json").write_text(json.dumps({"attempt": 1, "artifacts": artifacts}))
    trials[1] = finished(POOL, 1, True, state="failed", error=f'{hostile}" onload="x')
    return build_report(view(trials, question=hostile, **PAPER), tmp_path / "report")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_runs_nothing_and_fetches_nothing(tmp_path: Path) -> None:
    parser = Tags()
    parser.feed(built(tmp_path).page.read_text())
    names = {tag for tag, _ in parser.seen}
    assert not names & {"script", "link", "iframe", "object"}
    assert {"svg", "img", "table", "style"} <= names
    for tag, attributes in parser.seen:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:image/", "#")), (tag, value)


def test_the_page_follows_the_readers_colours(tmp_path: Path) -> None:
    text = built(tmp_path).page.read_text()
    assert "color-scheme: light dark" in text
    assert "currentColor" in text
    assert "#010203" not in text
    assert 'name="viewport"' in text


def test_json_and_csv_hold_the_numbers(tmp_path: Path) -> None:
    report = built(tmp_path)
    data = json.loads((report.folder / "report.json").read_text())
    align = data["arms"][1]
    assert align["metrics"]["segm/AP"]["by_seed"] == {"0": 0.303, "1": 0.305, "2": 0.303}
    assert list(align["differences"]["segm/AP"]["by_seed"]) == ["0", "2"]
    (contrast,) = data["contrasts"]
    assert (contrast["arm"], contrast["reference"]) == ("roi=RoIAlign", "roi=RoIPool")
    assert contrast["verdict"] == ""
    assert "maskray retry" in contrast["withheld"]
    assert contrast["difference"] == pytest.approx(align["differences"]["segm/AP"]["mean"])
    rows = list(csv.DictReader(io.StringIO((report.folder / "table.csv").read_text())))
    assert len(rows) == 5 * 2 + 1
    assert {(row["arm"], row["roi"]) for row in rows} == {
        ("roi RoIPool", "RoIPool"),
        ("roi RoIAlign", "RoIAlign"),
    }
    assert {row["state"] for row in rows} == {"done", "failed"}
    assert (report.folder / "table.txt").read_text() == report.table + "\n"


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


def test_a_result_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        result = {"attempt": 1, "artifacts": {"picture/last": path}}
        (Path(trials[0].storage) / "result.json").write_text(json.dumps(result))
        assert "<img" not in build_report(view(trials), tmp_path / "report").page.read_text()


def test_files_of_another_version_cost_no_report(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    first, second = (Path(trial.storage) for trial in trials[:2])
    spec = json.loads((first / "attempts" / "1" / "spec.json").read_text())
    spec["run"]["model"]["dilation"] = spec["novelty"] = 2
    (first / "attempts" / "1" / "spec.json").write_text(json.dumps(spec))
    text = table(view(trials, **PAPER))
    # What this version does not know may be anything.
    said = "No paper column: roi=RoIPool/seed-0: its record: model.dilation: no such field"
    assert said in text
    (second / "result.json").write_text(json.dumps({"attempt": 1, "artifacts": ["series"]}))
    (second / "attempts" / "1" / "spec.json").write_text(json.dumps({"run": 3, "tags": None}))
    said = "roi=RoIPool/seed-1: the validation set is of unknown size"
    assert said in table(view(trials, **PAPER))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", None),
        ("result.json", b"[" * 5000),
        ("artifacts/series.parquet", None),
        ("artifacts/series.parquet", b"PAR1 and no more"),
        ("attempts/1/spec.json", b'{"tags": {"maskray.val_images": "many"}}'),
    ],
)
def test_one_poisoned_folder_costs_no_report(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Without content there is a pipe."""
    trials = paper_study(tmp_path)
    folder = Path(trials[0].storage)
    (folder / "artifacts").mkdir(exist_ok=True)
    artifacts = {"series": "artifacts/series.parquet"}
    (folder / "result.json").write_text(json.dumps({"attempt": 1, "artifacts": artifacts}))
    (folder / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(content)
    assert "RoIAlign" in build_report(view(trials), tmp_path / "report").page.read_text()


def test_curves_are_thinned_to_means() -> None:
    assert smooth([0, 1, 2, 3], [1.0, 3.0, float("nan"), 5.0], points=2) == ([0.5, 2.5], [2.0, 5.0])
