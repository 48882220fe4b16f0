"""The report holds the numbers in every form, and is safe to open."""

from __future__ import annotations

import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from orchestrator.results.plots.curves import smooth
from orchestrator.results.plots.style import colours
from orchestrator.results.report import Contents, Report, build_report
from tests.orchestrator.results.paper_study import PAPER, POOL, paper_study, table, view
from tests.orchestrator.studies import finished


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
