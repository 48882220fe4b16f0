"""`maskray compare` on random tables against scipy and statsmodels, on our files, on bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from contract.study import Variance
from orchestrator.cli.app import app
from orchestrator.results.compare import Compared, compare
from orchestrator.results.measured import read_measured


def table(path: Path, seed: int, arms: int = 3, seeds: int = 5, metrics: int = 2) -> Path:
    rng = np.random.default_rng(seed)
    lines = ["arm,seed,metric,value"]
    for metric in ("segm/AP", "bbox/AP", "bbox/AP50")[:metrics]:
        for arm in range(arms):
            level = 0.3 + 0.01 * rng.normal()
            values = level + 0.005 * rng.normal(size=rng.integers(3, seeds + 1))
            lines += [f"arm-{arm},{s},{metric},{value:.6f}" for s, value in enumerate(values)]
    path.write_text("\n".join(lines) + "\n")
    return path


def of(*paths: Path, **options: Any) -> Compared:
    return compare(read_measured(paths), **options)


@pytest.mark.parametrize("variance", ["pooled", "own"])
@pytest.mark.parametrize("seed", range(10))
def test_two_arms_are_statsmodels_intervals(tmp_path: Path, seed: int, variance: Variance) -> None:
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    measured = read_measured([table(tmp_path / "t.csv", seed, arms=2)])
    result = compare(measured, variance=variance)
    (judged,) = result.contrasts
    reference, arm = (list(v.values()) for v in measured.values["segm/AP"].values())
    means = weightstats.CompareMeans.from_data(arm, reference)
    usevar = "pooled" if variance == "pooled" else "unequal"
    low, high = means.tconfint_diff(usevar=usevar)
    assert (judged.estimate.low, judged.estimate.high) == pytest.approx((low, high))
    p = means.ttest_ind(usevar=usevar)[1]
    assert (judged.verdict in ("better", "worse")) == (p < 0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_model_gives_the_same_standard_errors(tmp_path: Path, seed: int) -> None:
    api = pytest.importorskip("statsmodels.api")
    measured = read_measured([table(tmp_path / "t.csv", seed, arms=4, metrics=1)])
    by_arm = measured.values["segm/AP"]
    names = list(by_arm)
    y = [v for name in names for v in by_arm[name].values()]
    x = [[float(name == other) for other in names] for name in names for _ in by_arm[name]]
    fit = api.OLS(y, np.array(x)).fit()
    for judged in compare(measured).contrasts:
        row = [float(name == judged.arm) - float(name == names[0]) for name in names]
        test = fit.t_test(row)
        estimate = judged.estimate
        assert estimate.difference == pytest.approx(float(np.squeeze(test.effect)))
        assert estimate.df == fit.df_resid
        # Every interval of the family is as wide in standard errors.
        ratio = (estimate.high - estimate.difference) / float(np.squeeze(test.sd))
        assert ratio == pytest.approx(
            (
                compare(measured).contrasts[0].estimate.high
                - compare(measured).contrasts[0].estimate.difference
            )
            / float(np.squeeze(fit.t_test([-1.0, 1.0, 0.0, 0.0]).sd))
        )


def test_the_answer_is_one_object_without_a_service(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", 1)
    options = ["--reference", "arm-2", "--primary", "bbox/AP", "--margin", "0.5", "--json"]
    done = CliRunner().invoke(app, ["compare", str(path), *options])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [(c["arm"], c["reference"], c["metric"]) for c in answer["contrasts"]] == [
        ("arm-0", "arm-2", "bbox/AP"),
        ("arm-1", "arm-2", "bbox/AP"),
    ]
    assert list(answer["contrasts"][0]) == [
        *("arm", "reference", "metric", "difference", "low", "high", "verdict", "resolvable")
    ]
    assert {c["metric"] for c in answer["exploratory"]} == {"segm/AP"}
    assert "verdict" not in answer["exploratory"][0]
    text = CliRunner().invoke(app, ["compare", str(path)]).stdout
    assert "Minus arm-0, in points (all 2 hold at once in 95% of studies)" in text
    assert "Exploratory: plain 95% intervals" in text


def test_a_margin_is_in_points(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [f"{arm},{s},segm/AP,{0.3 + 0.0005 * s}" for arm in ("a", "b") for s in range(5)]
    path.write_text("\n".join(["arm,seed,metric,value", *rows]))
    assert of(path).contrasts[0].verdict == "not resolved"
    assert of(path, margin=1.0).contrasts[0].verdict == "equivalent"
    assert of(path, margin=0.01).contrasts[0].verdict == "not resolved"
    with pytest.raises(ValueError, match="--margin: 101"):
        of(path, margin=101)


def test_two_seeds_withhold_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [
        f"{arm},{s},m/AP,{v + 0.001 * s}" for arm, v in (("a", 0.3), ("b", 0.5)) for s in (0, 1)
    ]
    path.write_text("\n".join(["arm,seed,metric,value", *rows]))
    (judged,) = of(path).contrasts
    assert judged.verdict == "withheld"
    assert of(path).notes == ("no verdict on b: 2 seeds of an arm, and a verdict takes 3",)
    single = tmp_path / "single.csv"
    single.write_text("arm,seed,metric,value\na,0,m/AP,0.1\nb,0,m/AP,0.2\n")
    assert of(single).as_json()["contrasts"][0]["low"] is None


def report(states: tuple[str, ...] = ("done", "done", "done")) -> dict[str, Any]:
    def arm(level: str, baseline: bool, values: list[float]) -> dict[str, Any]:
        by_seed = {str(s): v for s, v in enumerate(values) if states[s] == "done"}
        trials = [{"seed": s, "state": state} for s, state in enumerate(states)]
        return {
            "arm": {"roi": level},
            "baseline": baseline,
            "metrics": {"segm/AP": {"by_seed": by_seed}},
            "trials": trials,
        }

    return {
        "arms": [
            arm("align", False, [0.303, 0.304, 0.303]),
            arm("pool", True, [0.270, 0.271, 0.269]),
        ]
    }


def test_a_studys_report_is_compared_with_its_baseline(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report()))
    for path in (tmp_path, tmp_path / "report.json"):
        result = of(path)
        assert (result.reference, result.contrasts[0].verdict) == ("roi=pool", "better")
    (tmp_path / "report.json").write_text(json.dumps(report(("done", "done", "failed"))))
    assert of(tmp_path).contrasts[0].why == "roi=align, seed 2 is failed"


def test_what_a_report_withholds_stays_withheld(tmp_path: Path) -> None:
    weights = {"roi=align": 1.0, "roi=pool": -1.0}
    withheld = {"weights": weights, "withheld": "roi=align: has not learned"}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report() | {"contrasts": [withheld], "primary": "segm/AP"}))
    assert of(path).contrasts[0].why == "roi=align: has not learned"
    path.write_text(json.dumps(report() | {"contrasts": [], "machinery_only": "one seed"}))
    assert of(path).contrasts[0].why == "one seed"


def test_a_value_that_is_not_finite_withholds_its_arm(tmp_path: Path) -> None:
    """A seed that diverged: without it the arm looks better."""
    path = table(tmp_path / "t.csv", 0, arms=2, metrics=1)
    path.write_text(path.read_text() + "arm-1,9,segm/AP,nan\n")
    (judged,) = of(path).contrasts
    assert (judged.verdict, judged.why) == ("withheld", "arm-1, seed 9 has segm/AP nan")


def test_trials_as_status_prints_them_are_read(tmp_path: Path) -> None:
    trials = [
        {
            "arm": {"roi": level},
            "seed": s,
            "state": "done",
            "baseline": level == "pool",
            "metrics": {"segm/AP": base + s / 1000, "images_per_s": 9.0},
        }
        for level, base in (("align", 0.33), ("pool", 0.3))
        for s in range(3)
    ]
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"trials": trials}))
    assert of(path).contrasts[0].verdict == "better"
    assert list(read_measured([path]).values) == ["segm/AP"]


def test_folders_of_runs_are_arms_by_their_names(tmp_path: Path) -> None:
    folders = []
    # The depth of a network is no seed.
    for name, base in (("pool", 0.30), ("align", 0.33), ("r50", 0.31), ("r101", 0.32)):
        for seed in range(3):
            folder = tmp_path / f"{name}-{seed}"
            (folder / "attempts" / "1").mkdir(parents=True)
            (folder / "attempts/1/spec.json").write_text(json.dumps({"run": {"seed": seed}}))
            metrics = {"segm/AP": base + seed / 1000, "images_per_s": 9.0}
            (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
            folders.append(folder)
    result = of(*folders)
    assert (result.reference, [c.arm for c in result.contrasts]) == (
        "pool",
        ["align", "r50", "r101"],
    )
    assert result.contrasts[0].estimate.seeds == 3


def test_a_folder_without_a_seed_in_its_name_is_an_arm_of_its_own(tmp_path: Path) -> None:
    for name in ("r50", "r101"):
        folder = tmp_path / name
        (folder / "attempts" / "1").mkdir(parents=True)
        (folder / "attempts/1/spec.json").write_text(json.dumps({"run": {"seed": 0}}))
        (folder / "result.json").write_text(json.dumps({"metrics": {"segm/AP": 0.3}}))
    assert read_measured([tmp_path / "r50", tmp_path / "r101"]).arms == ["r50", "r101"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "arm,seed,metric\na,0,m\n",
            "line 1: no column 'value'; the head is arm,seed,metric,value",
        ),
        ("arm,seed,metric,value\na,x,m,0.1\n", "line 2: seed 'x' is no number"),
        ("arm,seed,metric,value\na,0.5,m,0.1\n", "line 2: seed '0.5' is no whole number"),
        ("arm,seed,metric,value\na,0,m,high\n", "line 2: value 'high' is no number"),
        (
            "arm,seed,metric,value\na,0,m,30.1\n",
            "line 2: 30.1 is no fraction; divide percent by 100",
        ),
        ("arm,seed,metric,value\na,0,m,0.1\na,0,m,0.2\n", "line 3: a, seed 0, m is there already"),
        ("arm,seed,metric,value\n,0,m,0.1\n", "line 2: the arm or the metric is empty"),
        ("arm,seed,metric,value\n", "holds no number of any metric"),
        ("arm,seed,metric,value\na,0,m,0.1\n", "no arm beside a has m"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.csv|arm") as caught:
        of(path)
    assert said in str(caught.value)


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", 0)
    with pytest.raises(ValueError, match="--reference: there is no 'arm-9'; did you mean 'arm-"):
        of(path, reference="arm-9")
    with pytest.raises(
        ValueError, match="--primary: there is no 'segm/PA'; did you mean 'segm/AP'"
    ):
        of(path, primary="segm/PA")
    with pytest.raises(ValueError, match="no such file"):
        of(tmp_path / "absent.csv")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json: is no report\.json"):
        of(tmp_path / "x.json")
