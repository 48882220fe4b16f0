"""AP of resampled images from matches: pycocotools on the very same images says the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract.answers import TrialView
from contract.attempt import MATCHES
from orchestrator.results.looks import verdicts_of
from orchestrator.results.noise import images
from orchestrator.results.noise.bootstrap import (
    RESAMPLES,
    THRESHOLDS,
    Matched,
    average_precision,
    image_error,
    resampled_counts,
    with_error,
)
from orchestrator.results.noise.images import _read
from orchestrator.results.report import Contents
from orchestrator.results.statistics.contrasts import Contrast, Estimate
from orchestrator.trial_folder import TrialFolder
from pipelines.evaluate.evaluation import evaluate
from pipelines.evaluate.matches import evaluate_and_match
from tests.orchestrator.results.paper_study import ALIGN, PAPER, paper_study, paper_trial, view
from tests.orchestrator.studies import finished
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


def test_the_noise_of_images_adds_to_that_of_seeds() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(0, 0.01, RESAMPLES)  # shared by both arms
    weights = {"a": 1.0, "b": -1.0}
    # Images that move both arms alike move no difference.
    alike = {"a": [0.3 + images, 0.32 + images], "b": [0.2 + images]}
    assert image_error(weights, alike) == pytest.approx(0, abs=1e-12)
    # Those that move one seed of two count by half.
    apart = {"a": [0.3 + images, 0.32 + 0 * images], "b": [0.2 + 0 * images]}
    assert image_error(weights, apart) == pytest.approx(0.005, rel=0.1)
    contrast = Contrast("a", "segm/AP", weights)
    estimate = Estimate(contrast, 0.1, 0.094, 0.106, 0.1, 2, 4.0, quantile=2.0)  # an error of 0.003
    assert with_error(estimate, 0.0) == pytest.approx((0.094, 0.106))
    assert with_error(estimate, 0.004) == pytest.approx((0.09, 0.11))


def test_the_report_has_it_where_trials_left_their_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = paper_study(tmp_path)
    assert not Contents.of(view(trials, **PAPER)).with_images.with_images
    for trial in trials:
        _leave(tmp_path, trial, trial.seed)
    study = view(trials, **PAPER).model_copy(update={"storage": str(tmp_path / "kept")})
    contents = Contents.of(study)
    low, high = contents.with_images.with_images["roi=RoIAlign"]
    estimate = contents.comparison.answers[0].estimate
    assert low == pytest.approx(estimate.low)  # both arms have the same detections here
    assert high == pytest.approx(estimate.high)
    assert "Evaluation noise: 95% over seeds" in contents.text()
    (one,) = json.loads(contents.rendered("json"))["contrasts"]
    assert (one["low_with_images"], one["high_with_images"]) == (low, high)
    assert not contents.comparison.with_images  # of the forms that do not show it

    (kept,) = (tmp_path / "kept" / "s-1" / "report").iterdir()
    with monkeypatch.context() as patch:  # it takes seconds a trial
        patch.setattr(images, "average_precision", None)
        assert Contents.of(study).with_images.with_images == {"roi=RoIAlign": (low, high)}
    folder = TrialFolder(str(tmp_path))
    for damaged in (b"[1]", b'{"roi=RoIAlign": [NaN, 1]}', b" " * 2**17):
        kept.write_bytes(damaged)
        assert images._read_kept(folder, str(kept.relative_to(tmp_path))) is None

    # A contrast whose verdict is withheld has no interval of this kind either.
    lost = finished(ALIGN, 3, state="failed", error_class="diverged")
    withheld = Contents.of(view([*trials, lost], **PAPER))
    assert withheld.comparison.answers[0].withheld
    assert not withheld.with_images.with_images


def test_the_seeds_after_a_first_verdict_are_not_behind_it(tmp_path: Path) -> None:
    trials = [one.model_copy(update={"identity": one.key}) for one in paper_study(tmp_path)]
    later = paper_trial(tmp_path, ALIGN, 3, 0.304).model_copy(update={"identity": "later"})
    first = view(trials, **PAPER)
    verdicts = list(verdicts_of(first, Contents.of(first).comparison, 1.0))
    again = view([*trials, later], **PAPER).model_copy(update={"verdicts": verdicts})
    for study, last in ((again, 2), (view([*trials, later], **PAPER), 3)):
        comparison = Contents.of(study).comparison
        behind = images._behind(comparison.answers[0], comparison)
        assert {arm: max(by_seed) for arm, by_seed in behind.items()} == {
            "roi=RoIPool": 2,
            "roi=RoIAlign": last,
        }


def _leave(tmp_path: Path, trial: TrialView, seed: int) -> None:
    coco = random_coco(0)
    _, found = evaluate_and_match(_written(tmp_path, coco), detections(coco, seed), "bbox")
    folder = Path(trial.storage)
    (folder / "m.npz").write_bytes(found.file())
    result = {"attempt": 1, "artifacts": {MATCHES.format(kind="segm"): "m.npz"}}
    (folder / "result.json").write_text(json.dumps(result))


def _written(folder: Path, coco: dict[str, Any]) -> Path:
    (folder / "gt.json").write_text(json.dumps(coco))
    return folder / "gt.json"
