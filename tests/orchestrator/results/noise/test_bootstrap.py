"""AP of resampled images from matches: pycocotools on the very same images says the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract.attempt import MATCHES
from orchestrator.results.noise.bootstrap import (
    RESAMPLES,
    THRESHOLDS,
    Matched,
    average_precision,
    resampled_counts,
    two_way,
)
from orchestrator.results.noise.images import _read
from orchestrator.results.report import Contents
from pipelines.evaluate.evaluation import evaluate
from pipelines.evaluate.matches import evaluate_and_match
from tests.orchestrator.results.test_report import PAPER, paper_study, view
from tests.pipelines.evaluate.test_engines import random_coco


def detections(coco: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Boxes near the objects, none with the score of another."""
    rng = np.random.default_rng(seed)
    results = []
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        for _ in range(2):
            box = [x + rng.normal(), y + rng.normal(), w * rng.uniform(0.8, 1.2), h]
            placed = {key: a[key] for key in ("image_id", "category_id")}
            results.append({**placed, "bbox": box, "score": float(rng.random())})
    return results


def repeated(coco: dict[str, Any], results: list[dict[str, Any]], counts: Any) -> Any:
    """The same data with each image as often as `counts` says, under new ids."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, count in zip(sorted(coco["images"], key=lambda i: i["id"]), counts, strict=True):
        for _ in range(count):
            images.append({**image, "id": len(images) + 1})
            of = lambda record, old=image["id"]: record["image_id"] == old  # noqa: E731
            new = {"image_id": len(images)}
            for a in filter(of, coco["annotations"]):
                annotations.append({**copy.deepcopy(a), **new, "id": len(annotations) + 1})
            found += [{**r, **new} for r in filter(of, results)]
    return {**coco, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(3))
def test_weighted_images_are_repeated_images(seed: int, tmp_path: Path) -> None:
    coco = random_coco(seed)
    results = detections(coco, seed)
    (tmp_path / "gt.json").write_text(json.dumps(coco))
    own, matches = evaluate_and_match(tmp_path / "gt.json", results, "bbox")
    assert own == evaluate(tmp_path / "gt.json", results, "bbox"), "one comparison gives both"
    found = Matched(*matches)
    counts = resampled_counts(len(coco["images"]))[seed]
    for weights in (np.ones_like(counts), counts):
        again, of_again = repeated(coco, results, weights)
        (tmp_path / "again.json").write_text(json.dumps(again))
        stats = evaluate(tmp_path / "again.json", of_again, "bbox").stats
        for name, thresholds in THRESHOLDS.items():
            ap = average_precision(found, thresholds, weights)
            assert ap == pytest.approx(stats[name], abs=1e-9), (name, weights)


def test_the_file_keeps_every_array_and_another_file_costs_no_report(tmp_path: Path) -> None:
    coco = random_coco(0)
    _, found = evaluate_and_match(_written(tmp_path, coco), detections(coco, 0), "bbox")
    again = _read(found.file())
    assert again is not None
    assert all((one == other).all() for one, other in zip(found, vars(again).values(), strict=True))
    assert _read(b"no file of arrays") is None
    assert _read(found._replace(image=found.image + 99).file()) is None
    assert _read(found._replace(objects=found.objects[0]).file()) is None
    assert _read(found._replace(matched=found.matched[1:]).file()) is None
    assert _read(b"") is None


def test_two_way_holds_both_noises() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(0, 0.01, RESAMPLES)  # shared by both arms
    weights = {"a": 1.0, "b": -1.0}
    # Images that move both arms alike move no difference.
    alike = {"a": [0.3 + images] * 2, "b": [0.2 + images] * 2}
    assert two_way(weights, alike) == pytest.approx((0.1, 0.1))
    # Seeds alone: one arm's mean of two draws of 0.30 and 0.32.
    seeds = {"a": [0 * images + 0.30, 0 * images + 0.32], "b": [0 * images + 0.2]}
    assert two_way(weights, seeds) == pytest.approx((0.1, 0.12))
    # Independent images: 1.96 sd to each side.
    apart = {"a": [0.3 + images], "b": [0.2 + 0 * images]}
    low, high = two_way(weights, apart)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.01, rel=0.2)


def test_the_report_has_it_where_trials_left_their_matches(tmp_path: Path) -> None:
    trials = paper_study(tmp_path)
    assert not Contents.of(view(trials, **PAPER)).comparison.with_images
    for trial in trials:
        coco = random_coco(0)
        _, found = evaluate_and_match(
            _written(tmp_path, coco), detections(coco, trial.seed), "bbox"
        )
        folder = Path(trial.storage)
        name = MATCHES.format(kind="segm")
        (folder / "m.npz").write_bytes(found.file())
        result = {"attempt": 1, "artifacts": {name: "m.npz"}}
        (folder / "result.json").write_text(json.dumps(result))
    contents = Contents.of(view(trials, **PAPER))
    low, high = contents.comparison.with_images["roi=RoIAlign"]
    assert low < 0 < high  # both arms have the same detections here
    assert "Evaluation noise: 95% over seeds" in contents.text()
    (one,) = json.loads(contents.rendered("json"))["contrasts"]
    assert (one["low_with_images"], one["high_with_images"]) == (low, high)


def _written(folder: Path, coco: dict[str, Any]) -> Path:
    (folder / "gt.json").write_text(json.dumps(coco))
    return folder / "gt.json"
