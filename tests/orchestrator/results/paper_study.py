"""A small finished study in the paper's recipe, with the folders of its trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contract.answers import StudyView, TrialView
from orchestrator.results.report import Contents
from orchestrator.study.baseline import BaselineRun
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
