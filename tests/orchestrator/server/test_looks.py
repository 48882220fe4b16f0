"""Seeds until it is settled: what the service does at a look, and what a report says meanwhile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from contract.answers import StudyView
from contract.study import Baseline, Study, Submission, TrialPlan
from orchestrator.ledger import changes, commands, queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import TRIALS
from orchestrator.results.cells import arms_table
from orchestrator.results.report import Contents, build_report
from orchestrator.server import accept
from orchestrator.server.looks import take_due
from orchestrator.server.views import study_views
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import identity

LOOKS = {"start": 3, "most": 10, "looks": [3, 5, 7, 10]}
POOL = [0.300, 0.302, 0.301, 0.300, 0.302, 0.301, 0.300]
CLEAR = [0.330, 0.332, 0.331]
NEAR = [0.302, 0.3035, 0.3025, 0.3035, 0.3015, 0.3025, 0.302]
Values = Mapping[str, Sequence[float]]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def submit(ledger: Ledger, tmp_path: Path, seeds: Any, arms: Sequence[str], **fields: Any) -> str:
    factors = {"roi": {arm: {"model.roi.kind": arm} for arm in arms}}
    study = Study(
        name="s", baseline=Baseline(preset="tiny"), factors=factors, seeds=seeds,
        metrics=("segm/AP",), **fields,
    )  # fmt: skip
    trials = tuple(
        TrialPlan(
            key=f"roi={arm}/seed-{seed}",
            arm={"roi": arm},
            seed=seed,
            baseline=arm == arms[0],
            identity=identity(f"{arm}-{seed}"),
            run={"seed": seed},
        )
        for arm in arms
        for seed in study.every_seed
    )
    sent = Submission(study=study, study_yaml="name: s\n", trials=trials)
    return accept.accept(ledger, ServiceSettings(home=str(tmp_path)), sent, "ann", 1.0)[0]


def view_of(ledger: Ledger, study: str) -> StudyView:
    with ledger.reading() as transaction:
        return study_views(transaction, {}, study)[0]


def finish(ledger: Ledger, study: str, values: Values, **change: Any) -> int:
    """Ends every trial that may run with its number; how many that were."""
    queued = [trial for trial in view_of(ledger, study).trials if trial.state == "queued"]
    with ledger.writing() as transaction:
        for trial in queued:
            value = values[trial.arm["roi"]][trial.seed]
            new = {"state": "done", "metrics": {"segm/AP": value}, **change}
            transaction.execute(update(TRIALS).where(TRIALS.c.id == trial.trial).values(new))
        changes.end_study_if_over(transaction, study, 2.0)
    return len(queued)


def counts(ledger: Ledger, study: str) -> dict[str, int]:
    return view_of(ledger, study).counts


def report(ledger: Ledger, study: str, tmp_path: Path) -> tuple[str, dict[str, Any], str]:
    built = build_report(view_of(ledger, study), tmp_path / "report")
    data = json.loads((built.folder / "report.json").read_text())
    return built.table, data, built.page.read_text()


def test_a_clear_difference_stops_at_the_first_look(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    assert counts(ledger, study) == {"queued": 6, "held": 14}
    assert take_due(ledger, 2.0) == 0  # nothing has ended yet
    assert finish(ledger, study, {"pool": POOL, "align": CLEAR}) == 6
    assert view_of(ledger, study).state == "active"
    assert take_due(ledger, 3.0) == 1
    view = view_of(ledger, study)
    assert (view.state, view.counts) == ("done", {"done": 6, "spared": 14})
    assert (view.verdicts[0].verdict, view.verdicts[0].seeds) == ("better", 3)
    take_due(ledger, 4.0)
    assert view_of(ledger, study).verdicts == view.verdicts  # judged once
    assert take_due(ledger, 5.0) == 0
    table, data, _ = report(ledger, study, tmp_path)
    assert "the looks saved 14 of 20 trials" in table
    (answer,) = data["contrasts"]
    assert (answer["verdict"], answer["seeds"], data["spared"]) == ("better", 3, 14)


def test_an_interval_of_three_seeds_is_that_of_its_boundary(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    finish(ledger, study, {"pool": POOL, "align": CLEAR})
    take_due(ledger, 3.0)
    (verdict,) = view_of(ledger, study).verdicts
    half = (verdict.high - verdict.low) / 2
    assert half / (0.001 * (2 / 3) ** 0.5) == pytest.approx(5.827, abs=0.001)  # t, 0.43%, df 4


def test_between_looks_there_are_values_alone(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    finish(ledger, study, {"pool": POOL, "align": NEAR})
    assert take_due(ledger, 3.0) == 1
    assert counts(ledger, study) == {"done": 6, "queued": 4, "held": 10}
    table, data, page = report(ledger, study, tmp_path)
    assert "the next look is at 5 seeds; 6 of its 10 trials have ended" in table
    assert not data["contrasts"]
    for arm in data["arms"]:
        for number in [*arm["metrics"].values(), *arm["differences"].values()]:
            assert (number["low"], number["high"]) == (None, None)
    assert not re.search(r"±\d", table + page)
    assert "better" not in table
    for _ in range(2):
        finish(ledger, study, {"pool": POOL, "align": NEAR})
        take_due(ledger, 4.0)
    assert view_of(ledger, study).verdicts[0].verdict == "better"


def test_an_arm_that_is_settled_stops_and_the_reference_goes_on(
    ledger: Ledger, tmp_path: Path
) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align", "warp"])
    finish(ledger, study, {"pool": POOL, "align": CLEAR, "warp": NEAR})
    take_due(ledger, 3.0)
    view = view_of(ledger, study)
    assert view.looks[0].stopped == {"roi=align": "settled"}
    assert view.looks[0].closed
    assert not view.verdicts
    assert {t.arm["roi"] for t in view.trials if t.state == "queued"} == {"pool", "warp"}
    assert {t.arm["roi"] for t in view.trials if t.state == "spared"} == {"align"}
    assert not report(ledger, study, tmp_path)[1]["contrasts"]  # the study goes on
    while finish(ledger, study, {"pool": POOL, "align": CLEAR, "warp": NEAR}):
        take_due(ledger, 4.0)
    verdicts = {one.name: (one.verdict, one.seeds) for one in view_of(ledger, study).verdicts}
    assert verdicts["roi=align"] == ("better", 3)
    answers = {a["name"]: a["seeds"] for a in report(ledger, study, tmp_path)[1]["contrasts"]}
    assert answers == {name: seeds for name, (_, seeds) in verdicts.items()}


def test_a_look_waits_for_a_trial_that_somebody_tries_again(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    finish(ledger, study, {"pool": POOL, "align": CLEAR})
    noted = changes.Noted(
        {}, "", [], [], [], {f"{study}-000": "failed"}
    )  # it was read before the retry
    assert not changes.note_look(ledger, study, 0, noted, 3.0)
    assert not changes.note_look(ledger, study, 1, noted._replace(seen={}), 3.0)
    assert view_of(ledger, study).looks == []


def test_a_cancelled_study_ends_with_its_held_seeds(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    finish(ledger, study, {"pool": POOL, "align": NEAR})
    take_due(ledger, 3.0)
    with ledger.writing() as transaction:
        assert commands.cancel_study(transaction, study, "ann", 4.0)
    assert counts(ledger, study) == {"done": 6, "cancelled": 14}
    take_due(ledger, 5.0)
    view = view_of(ledger, study)
    assert [one.verdict for one in view.verdicts] == ["not resolved"]
    assert len(view.looks) == 1  # there was nothing new to look at
    with ledger.writing() as transaction:
        assert commands.retry_study(transaction, study, "ann", 6.0)
    assert counts(ledger, study) == {"done": 6, "queued": 4, "held": 10}  # as before
    last = view_of(ledger, study).trials[-1].trial
    with ledger.writing() as transaction:
        commands.cancel_trial(transaction, last, "ann", 7.0)
        commands.retry_trial(transaction, last, "ann", 8.0)
    assert counts(ledger, study)["queued"] == 5  # a person wants that one


def test_an_arm_that_diverged_takes_no_more_seeds_until_it_is_tried_again(
    ledger: Ledger, tmp_path: Path
) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    with ledger.writing() as transaction:
        lost = update(TRIALS).where(TRIALS.c.id == f"{study}-012")
        transaction.execute(lost.values(state="failed", error_class="diverged"))
    finish(ledger, study, {"pool": POOL, "align": CLEAR})
    take_due(ledger, 3.0)
    view = view_of(ledger, study)
    assert (view.verdicts, view.state) == ([], "failed")
    take_due(ledger, 4.0)
    with ledger.writing() as transaction:
        assert commands.retry_study(transaction, study, "ann", 5.0)
    assert finish(ledger, study, {"pool": POOL, "align": CLEAR}) == 1
    take_due(ledger, 6.0)
    assert [one.verdict for one in view_of(ledger, study).verdicts] == ["better"]


# --- seeds that a person adds -------------------------------------------------------------------


def test_the_first_verdict_stands_when_seeds_are_added(ledger: Ledger, tmp_path: Path) -> None:
    near = [0.3005, 0.3025, 0.3015, 0.312, 0.314, 0.313]
    first = submit(ledger, tmp_path, [0, 1, 2], ["pool", "align"])
    finish(ledger, first, {"pool": POOL, "align": near})
    take_due(ledger, 3.0)
    assert view_of(ledger, first).verdicts[0].verdict == "not resolved"
    more = submit(ledger, tmp_path, list(range(6)), ["pool", "align"])
    assert counts(ledger, more) == {"done": 6, "queued": 6}  # what is done is not paid for again
    finish(ledger, more, {"pool": POOL, "align": near})
    for at in (4.0, 5.0):  # before and after the service has judged the study
        table, data, _ = report(ledger, more, tmp_path)
        (answer,) = data["contrasts"]
        assert (answer["verdict"], answer["seeds"]) == ("not resolved", 3)
        assert (answer["first"]["study"], answer["later"]["seeds"]) == (first, 6)
        assert answer["later"]["low"] > 0  # which would be called better
        assert "not resolved (first, 3 seeds)" in table
        assert f"of 3 seeds in study {first}, and stands; with 6 seeds" in table
        take_due(ledger, at)
    assert len(view_of(ledger, more).verdicts) == 1


def test_a_loss_is_not_painted_as_the_win_that_it_was(ledger: Ledger, tmp_path: Path) -> None:
    falls = [*CLEAR, 0.2, 0.2, 0.2]
    first = submit(ledger, tmp_path, [0, 1, 2], ["pool", "align"])
    finish(ledger, first, {"pool": POOL, "align": falls})
    take_due(ledger, 3.0)
    more = submit(ledger, tmp_path, list(range(6)), ["pool", "align"])
    finish(ledger, more, {"pool": POOL, "align": falls})
    shown = []
    for study in (first, more):
        comparison = Contents.of(view_of(ledger, study)).comparison
        assert [answer.verdict for answer in comparison.answers] == ["better"]
        cell = arms_table(comparison, ["segm/AP"]).rows[1].cells[-1]
        shown.append((cell.text, cell.kind))
    assert shown == [("+3.0", "diff better"), ("-3.5", "diff")]


def test_a_first_interval_answers_another_margin_in_its_own_word(
    ledger: Ledger, tmp_path: Path
) -> None:
    def study(margin: float, arms: Sequence[str]) -> str:
        asked = {"c": {"of": arms[1], "minus": arms[0], "margin": margin}}
        return submit(ledger, tmp_path, [0, 1, 2], arms, contrasts=asked)

    first = study(5.0, ["pool", "align"])
    finish(ledger, first, {"pool": POOL, "align": NEAR})
    take_due(ledger, 3.0)
    assert view_of(ledger, first).verdicts[0].verdict == "equivalent"
    (known,) = report(ledger, first, tmp_path)[1]["contrasts"]
    for arms in (["pool", "align"], ["align", "pool"]):
        (answer,) = report(ledger, study(0.2, arms), tmp_path)[1]["contrasts"]
        assert answer["first"]["study"] == first
        assert answer["high"] - answer["low"] == pytest.approx(known["high"] - known["low"])
        assert answer["verdict"] == answer["first"]["verdict"] == "not resolved"


def test_a_reports_own_look_does_not_come_before_a_first_verdict(
    ledger: Ledger, tmp_path: Path
) -> None:
    values = {"pool": POOL, "align": [0.303, 0.3005, 0.304, 0.305, 0.3055, 0.306]}
    first = submit(ledger, tmp_path, [0, 1, 2], ["pool", "align"])
    finish(ledger, first, values)
    take_due(ledger, 3.0)
    looks = {"start": 3, "most": 6, "looks": [3, 6]}
    later = submit(ledger, tmp_path, looks, ["pool", "align"])
    take_due(ledger, 4.0)
    assert finish(ledger, later, values) == 6
    for at in (5.0, 6.0):  # before and after the service has noted the last look
        (answer,) = Contents.of(view_of(ledger, later)).comparison.answers
        assert answer.first is not None
        assert answer.first.study == first
        take_due(ledger, at)


def test_a_verdict_is_known_from_the_other_side_too(ledger: Ledger, tmp_path: Path) -> None:
    first = submit(ledger, tmp_path, [0, 1, 2], ["pool", "align"])
    finish(ledger, first, {"pool": POOL, "align": CLEAR})
    take_due(ledger, 3.0)
    turned = submit(ledger, tmp_path, [0, 1, 2], ["align", "pool"])
    (answer,) = report(ledger, turned, tmp_path)[1]["contrasts"]
    assert (answer["verdict"], answer["first"]["study"]) == ("worse", first)
    assert answer["difference"] == pytest.approx(-0.03)
    assert answer["later"] is None


def test_a_spared_seed_may_be_run_by_hand(ledger: Ledger, tmp_path: Path) -> None:
    study = submit(ledger, tmp_path, LOOKS, ["pool", "align"])
    finish(ledger, study, {"pool": POOL, "align": CLEAR})
    take_due(ledger, 3.0)
    with ledger.writing() as transaction:
        assert not commands.retry_study(transaction, study, "ann", 5.0)
        assert commands.retry_trial(transaction, f"{study}-003", "ann", 5.0)
        assert queries.anything_to_do(transaction)
    finish(ledger, study, {"pool": POOL, "align": CLEAR})
    take_due(ledger, 6.0)
    (verdict,) = view_of(ledger, study).verdicts
    assert verdict.seeds == 3
