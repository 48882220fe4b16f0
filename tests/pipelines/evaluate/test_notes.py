"""Where COCO's rules leave something out, evaluation says so."""

from __future__ import annotations

import json

import pytest

from contract.command import run_app
from contract.data import DataConfig
from pipelines.__main__ import app
from pipelines.evaluate.engines import COCO_SIGMAS, sigmas_for
from pipelines.evaluate.evaluation import evaluate
from tests.pipelines.tiny_coco import box_annotation, packed_coco, write_coco


def test_the_limit_of_100_is_told_where_it_binds(tmp_path, capsys):
    """250 perfect boxes in an image: COCO counts 100 of them, recall 0.4."""
    annotations = [box_annotation(n, bbox=[n % 25, n // 25, 5, 5]) for n in range(1, 251)]
    found = [
        {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": a["bbox"]} for a in annotations
    ]
    path = write_coco(tmp_path, annotations)
    (tmp_path / "dt.json").write_text(json.dumps(found))
    words = ["eval", "--gt", str(path), "--dt", str(tmp_path / "dt.json")]
    assert run_app(app, words, "maskray") == 0
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert "the best 100 detections" in note
    assert "150 of 250 objects cannot be found, 150 of 250 detections do not count" in note
    assert run_app(app, [*words, "--json"], "maskray") == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    assert evaluate(path, found[:100], "bbox").notes  # the objects alone are too many
    path = write_coco(tmp_path, annotations[:100])
    assert evaluate(path, found[:100], "bbox").notes == ()


def test_id_0_counts_as_any_other_in_packed_data(tmp_path):
    """pycocotools takes it for "unmatched", and scores 0.5 on the file as it is."""
    annotations = [box_annotation(0), box_annotation(1, bbox=[20, 5, 10, 10])]
    found = [
        {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": a["bbox"]} for a in annotations
    ]
    assert evaluate(packed_coco(tmp_path, annotations), found, "bbox").stats["AP"] == 1.0
    assert "number them from 1" in evaluate(tmp_path / "instances.json", found, "bbox").notes[0]


def test_sigmas_of_other_keypoints(tmp_path):
    assert sigmas_for(17, ()) == COCO_SIGMAS
    assert sigmas_for(2, ()) == (pytest.approx(0.067, abs=5e-4),) * 2
    assert sigmas_for(2, (0.1, 0.2)) == (0.1, 0.2)
    with pytest.raises(ValueError, match="3 sigmas for 2 keypoints; give one for each"):
        sigmas_for(2, (0.1, 0.2, 0.3))
    points = [[8, 8, 2, 12, 12, 2], [10, 8, 2, 12, 14, 1]]
    annotations = [
        box_annotation(n, bbox=[5 + n, 5, 10, 10], keypoints=p, num_keypoints=2)
        for n, p in enumerate(points, 1)
    ]
    category = {"id": 3, "name": "cat", "keypoints": ["left", "right"]}
    path = write_coco(tmp_path, annotations, categories=[category])
    found = [{"image_id": 1, "category_id": 3, "score": 0.9, "keypoints": p} for p in points]
    near = [
        f | {"keypoints": [v + (i % 3 < 2) for i, v in enumerate(f["keypoints"])]} for f in found
    ]
    assert evaluate(path, found, "keypoints").stats["AP"] == 1.0
    exact, loose = (
        evaluate(path, near, "keypoints", sigmas=(s, s)).stats["AP"] for s in (0.01, 0.5)
    )
    assert exact < loose == 1.0
    assert "COCO has no sigmas for 2 keypoints" in evaluate(path, found, "keypoints").notes[0]


def test_sigmas_of_a_run_are_asked_of_keypoints_alone(tmp_path):
    """A run with five keypoints is scored on boxes and masks too."""
    category = {"id": 3, "name": "cat", "keypoints": ["nose", "tail"]}
    annotation = box_annotation(1, keypoints=[8, 8, 2, 12, 12, 2], num_keypoints=2)
    data = packed_coco(tmp_path, [annotation], categories=[category])
    view = data.for_evaluation(DataConfig(train="t", val="v", oks_sigmas=(0.05, 0.05)))
    box = {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": annotation["bbox"]}
    assert evaluate(view, [box], "bbox").stats["AP"] == pytest.approx(1)
    points = {"image_id": 1, "category_id": 3, "score": 0.9, "keypoints": annotation["keypoints"]}
    assert evaluate(view, [points], "keypoints").stats["AP"] == pytest.approx(1)
