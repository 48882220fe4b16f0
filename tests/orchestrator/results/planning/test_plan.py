"""What a plan counts: trials, what is cached, hours where a speed is known, disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.answers import NodeView, StudyView
from contract.presets import preset
from contract.study import Submission
from orchestrator.results.planning.checkpoint_size import parameters
from orchestrator.results.planning.foresight import Spread, measured_spread
from orchestrator.results.planning.plan import (
    gangs_at_once,
    make_plan,
    measured_speeds,
    whole_hours,
)
from orchestrator.study.expand import expand
from orchestrator.study.read import read_study
from tests.orchestrator.studies import (
    COCO_80,
    CODE,
    SHAPES,
    finished,
    tiny_study,
    write_dataset,
    write_named_files,
)

ROOT = Path(__file__).parents[4]

ROI = {"roi": {"pool": {"model.roi.kind": "pool"}, "align": {"model.roi.kind": "align"}}}


def submission(tmp_path: Path, fresh: bool = False) -> Submission:
    resources = {"ranks": 2, "gpus_per_rank": 1}
    study = tiny_study(
        ROI,
        seeds=[0, 1],
        resources=resources,
        baseline={"preset": "tiny", "set": {"loop.steps": 450}},
    )
    trials = expand(study, data=str(write_dataset(tmp_path)), root=tmp_path, code=CODE).trials
    return Submission(study=study, study_yaml="", trials=trials, fresh=fresh)


def test_hours_follow_from_images_and_speed(tmp_path: Path) -> None:
    # 450 steps x 8 images = 3,600 images: 1 h at 1 image/s, half at 2; two trials each on 2 GPUs.
    plan = make_plan(submission(tmp_path), {}, {"roi=pool": 1.0, "roi=align": 2.0})
    assert [planned.hours for planned in plan.trials] == [1.0, 1.0, 0.5, 0.5]
    assert (plan.gpu_hours, plan.longest_h, plan.unknown, plan.ranks_at_once) == (6.0, 1.0, 0, 8)


def test_the_whole_study_at_the_clusters_size(tmp_path: Path) -> None:
    plan = make_plan(submission(tmp_path), {}, {"roi=pool": 1.0, "roi=align": 2.0}, gangs=2)
    assert plan.whole_h == 1.5  # 1 h and 0.5 h on each of two gangs
    assert (
        "1.0 h for the longest trial, 1.5 h for the study on this cluster, 6.0 GPU-hours"
        in plan.text()
    )
    assert whole_hours([3.0, 2.0, 2.0, 1.0], gangs=2) == 4.0
    assert whole_hours([3.0, 2.0], gangs=5) == 3.0


def test_how_many_trials_run_at_once_follows_from_the_nodes(tmp_path: Path) -> None:
    def nodes(*gpus: int) -> list[NodeView]:
        return [
            NodeView(id=f"n{i}", total={"CPU": 64, "GPU": count}, free={})
            for i, count in enumerate(gpus)
        ]

    study = submission(tmp_path).study  # two ranks of a GPU each
    assert [gangs_at_once(study, nodes(*gpus)) for gpus in ((), (1,), (1, 1), (8, 3))] == [
        0,
        0,
        1,
        5,
    ]
    together = study.model_copy(
        update={"resources": study.resources.model_copy(update={"max_nodes": 1})}
    )
    assert [gangs_at_once(together, nodes(*gpus)) for gpus in ((1, 1), (8, 3))] == [0, 5]


def test_cached_trials_cost_nothing(tmp_path: Path) -> None:
    sent = submission(tmp_path)
    answer = make_plan(sent, {sent.trials[0].identity: "t-7"}).as_json()
    assert [trial["cached"] for trial in answer["trials"]] == [True, False, False, False]
    assert answer["trials"][0]["cached_from"] == "t-7"
    assert (answer["totals"]["to_run"], answer["totals"]["trials_of_unknown_speed"]) == (3, 3)
    assert answer["totals"]["gpu_hours"] is None
    assert {"trial", "arm", "seed", "ranks", "cached"} <= set(answer["trials"][0])
    json.dumps(answer, allow_nan=False)


def test_fresh_trials_are_not_taken_from_anywhere(tmp_path: Path) -> None:
    sent = submission(tmp_path, fresh=True)
    assert not any(
        planned.cached for planned in make_plan(sent, {sent.trials[0].identity: "t-7"}).trials
    )


def test_the_text_says_what_is_not_known(tmp_path: Path) -> None:
    text = make_plan(submission(tmp_path), {}).text()
    assert "4 trials, 4 to run, 8 ranks if all run at once" in text
    assert "time: not known for 4 trials" in text


def test_speeds_come_from_the_latest_finished_trials() -> None:
    def view(name: str, at: float, speed: float) -> StudyView:
        trial = finished({"roi": "pool"}, 0, metrics={"images_per_s": speed})
        fields = {
            "study": "s",
            "owner": "o",
            "state": "done",
            "priority": 0,
            "storage": "",
            "spec": {},
        }
        return StudyView.model_validate(
            {**fields, "name": name, "created_at": at, "trials": [trial]}
        )

    assert measured_speeds("a", [view("a", 2, 5.0), view("a", 1, 4.0), view("b", 3, 9.0)]) == {
        "roi=pool": 5.0
    }


# Counted on built detectors (sum of numel over parameters and buffers), in millions.
BUILT_M = {
    "tiny": 3.9,
    "r50-c4": 36.0,
    "r50-c5": 41.6,
    "r50-fpn": 44.4,
    "r50-fpn-keypoint": 59.2,
    "vgg16-faster-rcnn": 138.3,
    "x101-64x4d-fpn": 102.5,
}


@pytest.mark.parametrize("name", sorted(BUILT_M))
def test_parameters_are_counted_about_right(name: str) -> None:
    assert parameters(preset(name)) == pytest.approx(1e6 * BUILT_M[name], rel=0.03)


# --- what it can see ------------------------------------------------------------------------------

SHIPPED = sorted(path.name for path in (ROOT / "studies").glob("*.yaml"))


def shipped(name: str, tmp_path: Path) -> Submission:
    study, text = read_study(ROOT / "studies" / name)
    names = SHAPES if study.baseline.preset == "tiny" else COCO_80
    data = write_dataset(tmp_path / "data", names, keypoints=True, masks=True)
    write_named_files(study, tmp_path)
    trials = expand(study, data=str(data), root=tmp_path, code=CODE).trials
    return Submission(study=study, study_yaml=text, trials=trials)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_says_what_it_can_see(name: str, tmp_path: Path) -> None:
    plan = make_plan(shipped(name, tmp_path), {})
    asked = plan.foresight.contrasts
    wanted = list(read_study(ROOT / "studies" / name)[0].contrasts)
    assert [one.asked.name for one in asked] == wanted or not wanted
    assert asked
    assert "in points of AP at a power of 80%" in plan.text()
    json.dumps(plan.as_json(), allow_nan=False)


def test_a_study_with_looks_shows_its_boundaries_and_what_it_may_cost(tmp_path: Path) -> None:
    study = tiny_study(ROI, seeds={"start": 3, "most": 10, "looks": [3, 5, 7, 10]})
    trials = expand(study, data=str(write_dataset(tmp_path)), root=tmp_path, code=CODE).trials
    assert len(trials) == 20
    plan = make_plan(Submission(study=study, study_yaml="", trials=trials), {})
    ahead = plan.foresight.looks
    assert ahead is not None
    assert ahead.reaches["bbox/AP"] == pytest.approx((5.827, 3.46, 2.83, 2.30), abs=0.03)
    # From the tables of docs/statistics.md: 10 seeds without 3.0, 1.8, 3.5 and 5.1, in two arms.
    assert list(ahead.expected.values()) == pytest.approx([14.0, 16.4, 13.0, 9.8], abs=0.5)
    text = plan.text()
    assert "Looks at 3, 5, 7, 10 seeds; an arm stops once its contrasts are settled" in text
    assert "if the others differ by 2 sd: about 13 of 20 trials" in text
    json.dumps(plan.as_json(), allow_nan=False)


def test_table_2d_needs_few_seeds_for_the_papers_difference(tmp_path: Path) -> None:
    plan = make_plan(shipped("table-2d.yaml", tmp_path), {}, spread=Spread(0.25, "a test"))
    masks, boxes = plan.foresight.contrasts
    assert (masks.expected, boxes.expected) == (pytest.approx(7.3), pytest.approx(5.8))
    assert masks.seeds == boxes.seeds == (3,)
    # Two metrics share the 5%: t(1 - 0.025 / 2, 4) = 3.495.
    assert masks.detectable[0] == pytest.approx(0.25 * 4.584 * (2 / 3) ** 0.5, rel=2e-3)


def test_the_spread_between_seeds_is_measured_where_it_can_be() -> None:
    trials = [
        finished({"roi": "pool"}, s, True, metrics={"bbox/AP": 0.3 + s / 100}) for s in range(3)
    ]
    fields = {
        "study": "s",
        "name": "s",
        "owner": "o",
        "state": "done",
        "priority": 0,
        "storage": "",
    }
    spec = {"baseline": {"preset": "tiny"}}
    view = StudyView.model_validate({**fields, "created_at": 0, "spec": spec, "trials": trials})
    spread = measured_spread("tiny", [view])
    assert spread is not None
    assert spread.points == pytest.approx(1.0)
    assert measured_spread("r50-fpn", [view]) is None
