"""The scores of an evaluation, on one rank and on three."""

from __future__ import annotations

from typing import Any

import pytest

from contract.metrics import result_kinds
from contract.recipe import RunConfig
from tests.workers.fakes import alone
from tests.workers.ranks import run_ranks
from tests.workers.trials import run_of
from workers.training.build import eval_loader, initial_detector, open_datasets
from workers.training.evaluate import (
    best_metric,
    evaluate_detector,
    metric_names,
    score,
)
from workers.training.world import World


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "segm/AP"),
        ({"model__mask__kind": "none"}, "bbox/AP"),
        ({"loop__best_metric": "bbox/AP75"}, "bbox/AP75"),
    ],
)
def test_the_best_weights_are_chosen_by_a_metric_that_the_model_has(packed, overrides, expected):
    assert best_metric(run_of(packed, **overrides)) == expected


def test_the_metrics_that_a_model_has_are_those_that_its_evaluation_finds(packed):
    run = run_of(packed, model__mask__loss__kind="softmax")
    _, data = open_datasets(run, "")
    nothing: dict[str, Any] = {kind: [] for kind in result_kinds(run.model)}
    for boundary in (False, True):
        names = metric_names(run.model, boundary)
        assert sorted(score(data, nothing, boundary).metrics) == sorted(names)
        assert ("boundary/APs" in names) == boundary


def test_the_score_of_three_ranks_is_that_of_one_to_the_bit(packed):
    run = run_of(packed, loop__eval_batch=1)
    alone_scores = scores(alone(), run)
    assert run_ranks(scores, 3, run)[0] == alone_scores
    assert alone_scores[1]["bbox"]


def scores(world: World, run: RunConfig) -> tuple[Any, ...]:
    _, data = open_datasets(run, "")
    scored = evaluate_detector(
        run.model, initial_detector(run), eval_loader(run, data, world), world
    )
    assert scored is not None
    ordered = {kind: sorted(results, key=str) for kind, results in scored.results.items()}
    return scored.metrics, ordered, scored.per_class
