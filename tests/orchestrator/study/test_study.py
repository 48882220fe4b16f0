"""A study file is plain data of bounded size; a mistake in it is one line that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.model import RoIPool
from contract.recipe import SGD
from contract.record import nearest
from contract.yaml import MAX_BYTES, parse_yaml
from orchestrator.study.baseline import BaselineRun
from orchestrator.study.paper import paper_tables
from orchestrator.study.read import read_study
from tests.orchestrator.studies import tiny_study

GOOD = "name: s\nbaseline: {preset: tiny}\n"
ROI = GOOD + "factors: {roi: {align: {}, pool: {model.roi.kind: pool}}}\n"
TWO = GOOD + "factors: {a: {'on': {}}, b: {'on': {}}}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_a_study_of_two_lines_is_a_study(tmp_path: Path) -> None:
    study, text = read_study(written(tmp_path, GOOD))
    assert (study.name, study.baseline.preset, study.seeds, text) == ("s", "tiny", (0,), GOOD)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: s\nname: t\nbaseline: {preset: tiny}\n", "line 2: name is given twice"),
        ("name: s\nbaseline: {preset: tiny, preset: r50-c4}\n", "baseline.preset is given twice"),
        ("name: !!python/object/apply:os.system ['true']\n", "is not allowed, write plain data"),
        ("name: !local x\n", "YAML tag '!local' is not allowed"),
        (
            "name: s\nbaseline: {preset: tiny}\nseeds: [0, .nan]\n",
            "line 3: seeds[1]: .nan is not a finite number",
        ),
        ("name: [s\n", "line 2: "),
        ("- a\n- b\n", "expected fields like 'name: ...', got list"),
        ("", "is empty"),
        ("name: s\n---\nname: t\n", "but found another document"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "'<<' is not supported"),
        ("[" * 2000 + "]" * 2000, "nested deeper"),
        (GOOD + "factors: {masks: {on: {}}}\n", "put the name in quotes"),
        (GOOD + "seed: [0]\n", "seed: no such field; did you mean 'seeds'?"),
        (GOOD + "seeds: [0, 0]\n", "seeds: seeds must be distinct"),
        (GOOD + "seeds: {start: 3, mots: 5}\n", "seeds.mots: no such field; did you mean 'most'?"),
        (GOOD + "seeds: {start: 2, looks: [2, 10]}\n", "seeds.start: Input should be greater"),
        (
            GOOD + "seeds: {most: 5}\n",
            "seeds: looks [3, 5, 7, 10] must begin at start, 3, and end at most, 5",
        ),
        (GOOD + "seeds: {looks: [3, 7, 7, 10]}\n", "must be at least two numbers that grow"),
        (GOOD + "resources: {ranks: two}\n", "resources.ranks: Input should be a valid integer"),
        (GOOD + "resources: {rank: 2}\n", "resources.rank: no such field; did you mean 'ranks'?"),
        (
            GOOD + "resources: {ranks: 2, gpus_per_rank: 0.5}\n",
            "resources: 2 ranks with gpus_per_rank 0.5 would share a GPU",
        ),
        (GOOD + "factors: {roi: {}}\n", "factors.roi: has no levels"),
        (GOOD + "factors: {roi: {'a=b': {}}}\n", "without '=', ',' or '/'"),
        (GOOD + "metrics: [segm/AP57]\n", "did you mean 'segm/AP75'?"),
        (GOOD + "metrics: []\n", "metrics: "),
        (
            GOOD + "metrics: [bbox/AR20]\n",
            "metrics: no metric 'bbox/AR20'; did you mean 'bbox/AR10",
        ),
        (GOOD + "primary: keypoints/AQ\n", "primary: no metric 'keypoints/AQ'; did you mean"),
        (ROI + "arms: {a: roi=alin}\n", "arms.a: roi has no level 'alin'; did you mean 'align'?"),
        (ROI + "arms: {a: ''}\n", "arms.a: is empty; write factor=level"),
        (
            ROI + "contrasts: {c: {of: alignn, minus: pool}}\n",
            "contrasts.c.of: no arm 'alignn'; did you mean 'align'?",
        ),
        (ROI + "contrasts: {c: {of: align}}\n", "contrasts.c.minus: is required"),
        (
            ROI + "contrasts: {c: {of: {of: align, minus: pool, minos: a}, minus: pool}}\n",
            "contrasts.c.of.minos: no such field; did you mean 'minus'?",
        ),
        (
            ROI + "contrasts: {c: {of: {of: align, minus: pol}, minus: pool}}\n",
            "contrasts.c.of.minus: no arm 'pol'; did you mean 'pool'?",
        ),
        (
            ROI + "contrasts: {c: {of: align, minus: pool, metric: segm/AQ}}\n",
            "contrasts.c.metric: no metric 'segm/AQ'; did you mean",
        ),
        (
            ROI + "contrasts: {c: {of: align, minus: pool, expected: beter}}\n",
            "contrasts.c.expected: Input should be '', 'better'",
        ),
        (
            ROI + "contrasts: {c: {of: align, minus: pool, expected: equivalent}}\n",
            "expected: equivalent needs a margin in points, such as margin: 1.0",
        ),
        (
            TWO + "contrasts: {c: {of: 'on', minus: baseline}}\n",
            "contrasts.c.of: 'on' is a level of a and of b; write a=on",
        ),
        (GOOD + "paper_table: 2z\n", "paper_table: no table '2z'"),
        (GOOD + "paper_rows: {a=b: x}\n", "has no effect without paper_table"),
        (GOOD + "paper_table: 2c\npaper_rows: {roi=x: RoIPool}\n", "'roi=x' is not 'factor=level'"),
        ("name: s\nbaseline: {}\n", "give either 'preset' or 'file'"),
        ("name: ../s\nbaseline: {preset: tiny}\n", "name: "),
        ("name: my study\nbaseline: {preset: tiny}\n", "'my-study' would pass"),
        ("name: s\nbasline: {preset: tiny}\n", "basline: no such field; did you mean 'baseline'?"),
        (
            GOOD + "factors: {lr: {optimiser.lr: {log: [0, 1], num: 3}}}\n",
            "factors: lr.optimiser.lr: the record: the ends of log are above 0",
        ),
        (
            GOOD + "factors: {lr: {optimiser.lr: {lg: [1, 2], num: 3}}}\n",
            "lg: no such field; did you mean 'log'?",
        ),
        (GOOD + "factors: {lr: {optimiser.lr: {linear: [1, 1], num: 3}}}\n", "both ends are 1"),
        (GOOD + "seeds: 0\n", "seeds: a number stands for so many seeds, from 0 on"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=r"study\.yaml") as caught:
        read_study(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_range_is_a_level_for_each_of_its_numbers(tmp_path: Path) -> None:
    text = GOOD + "factors: {lr: {optimiser.lr: {log: [1e-4, 1e-2], num: 5}}}\n"
    levels = read_study(written(tmp_path, text))[0].factors["lr"]
    assert list(levels) == ["0.0001", "0.000316", "0.001", "0.00316", "0.01"]
    assert levels["0.000316"] == {"optimiser.lr": 0.000316}
    text = GOOD + "factors: {n: {loop.steps: {linear: [100, 300], num: 3}}}\n"
    assert read_study(written(tmp_path, text))[0].factors["n"]["200"] == {"loop.steps": 200}


def test_a_number_of_seeds_counts_them_from_0(tmp_path: Path) -> None:
    assert read_study(written(tmp_path, GOOD + "seeds: 3\n"))[0].seeds == (0, 1, 2)


@pytest.mark.parametrize("metric", ["keypoints/AR", "segm-argmax/AP", "bbox/AR100"])
def test_what_an_evaluation_computes_is_a_metric_of_a_study(tmp_path: Path, metric: str) -> None:
    study, _ = read_study(written(tmp_path, GOOD + f"metrics: [{metric}]\nprimary: {metric}\n"))
    assert study.metrics == (metric,)


def test_ten_megabytes_are_refused_unread(tmp_path: Path) -> None:
    path = written(tmp_path, "a: " + "x" * (10 * MAX_BYTES))
    with pytest.raises(ValueError, match="larger than 1,000,000 bytes"):
        read_study(path)


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="more than 100,000 values"):
        parse_yaml("\n".join(lines), "bomb")


def test_numbers_and_names_are_read_as_people_mean_them() -> None:
    read = parse_yaml("lr: 1e-3\nlevels: {2: a, 3.5: b}\nday: 2024-01-02\n", "f")
    assert read == {"lr": 0.001, "levels": {"2": "a", "3.5": "b"}, "day": "2024-01-02"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read_study(tmp_path / "absent.yaml")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_study(path)


def test_a_baseline_is_complete_before_its_overrides(tmp_path: Path) -> None:
    study = tiny_study(baseline={"preset": "r50-fpn", "set": {"optimiser.lr": 0.01}})
    optimiser = BaselineRun.of(study, tmp_path).run.optimiser
    assert isinstance(optimiser, SGD)
    assert (optimiser.lr, optimiser.momentum) == (0.01, 0.9)


def test_a_run_file_is_a_baseline(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "preset: tiny\nloop: {steps: 7}\nmodel: {roi: {kind: pool}}\ndata: {train: t}\n"
    )
    run = BaselineRun.of(tiny_study(baseline={"file": "run.yaml"}), tmp_path).run
    assert (run.loop.steps, run.loop.global_batch) == (7, 8)
    assert (run.model.roi, run.data.train) == (RoIPool(), str(tmp_path / "t"))


def test_seeds_are_not_overrides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a study's seeds stand in its 'seeds'"):
        BaselineRun.of(tiny_study(baseline={"preset": "tiny", "set": {"seed": 3}}), tmp_path)


def test_an_unknown_preset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model preset 'tyni'"):
        BaselineRun.of(tiny_study(baseline={"preset": "tyni"}), tmp_path)
    (tmp_path / "run.yaml").write_text("preset: tyni\n")
    with pytest.raises(
        ValueError, match=r"run.yaml: preset: no model preset 'tyni'; did you mean 'tiny'\?"
    ):
        BaselineRun.of(tiny_study(baseline={"file": "run.yaml"}), tmp_path)


def test_the_paper_is_as_published() -> None:
    row = paper_tables()["2c"].rows["RoIAlign-ave"]
    assert row == {"segm/AP": 30.3, "segm/AP50": 51.2, "segm/AP75": 31.5}
    assert nearest("2cc", ["2c", "5"]) == "did you mean '2c'?"
