"""What a person sees of a study in MLflow: the page of its experiment, its parent run, its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from contract.metrics import tracker_keys
from contract.study import Study
from orchestrator.ledger.rows import StudyBrief, StudyRow, TrialBrief, TrialRow
from orchestrator.study.colours import colours_of
from orchestrator.study.contrasts import arm_name, primary_of
from orchestrator.study.links import SHARED_VIEW

ARM_TAG = "maskray.arm"
_SPLITS = {"train": "training", "val": "validation"}  # of the data -> MLflow's context
_SHORT = 12  # characters of a hash that a person compares


def experiment_tags(study: StudyRow) -> dict[str, str]:
    """What makes MLflow open the experiment as a study of training runs."""
    return {
        "maskray.study": study.id,
        "maskray.owner": study.owner,
        "mlflow.note.content": study.spec.question,
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": _keys([_primary(study.spec)])[0],
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        f"mlflow.sharedViewState.{SHARED_VIEW}": json.dumps(_view(study.spec)),
    }


def _view(spec: Study) -> dict[str, JsonValue]:
    """The state of MLflow's page of runs, as its own button for sharing a view writes it."""
    shown = _keys([*spec.metrics, "images_per_s"])
    return {
        "orderByKey": f"metrics.`{_keys([_primary(spec)])[0]}`",
        "orderByAsc": False,
        "selectedColumns": [
            *(f"metrics.`{key}`" for key in shown),
            *(f"attributes.`{name}`" for name in ("Duration", "Dataset", "Source", "User")),
            "tags.`maskray.seed`",
        ],
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": ARM_TAG}],
        },
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
    }


def parent_tags(study: StudyRow, plan: TrialRow | None) -> dict[str, str]:
    """plan: one of the study's trials, all of which run the same code."""
    tags = {"maskray.study": study.id, "maskray.owner": study.owner, "maskray.parent": study.id}
    return tags | _origin(study, plan.tags if plan else {})


def trial_tags(study: StudyBrief, trials: Sequence[TrialBrief], trial: TrialRow) -> dict[str, str]:
    """What a trial's run says of itself: its arm, its colour, whose it is, what is special."""
    arms = colours_of((arm_name(one.arm), one.baseline) for one in trials)
    name = arm_name(trial.arm)
    return {
        ARM_TAG: name,
        "maskray.seed": str(trial.seed),
        "mlflow.runColor": arms.get(name, ""),
        "mlflow.note.content": _description(study.spec, trial),
        **_origin(study, trial.tags),
    }


def datasets(trial: TrialRow) -> list[Mapping[str, JsonValue]]:
    """The run's inputs as MLflow takes them. Nothing is read of them: the manifest has the hash."""
    data = trial.run.get("data", {})
    inputs: list[Mapping[str, JsonValue]] = []
    for split, context in _SPLITS.items():
        uri, digest = str(data.get(split, "")), trial.tags.get(f"maskray.manifest_{split}", "")
        if not uri or not digest:
            continue
        images = trial.tags.get("maskray.val_images", "") if split == "val" else ""
        dataset: dict[str, JsonValue] = {
            "name": "/".join(uri.rstrip("/").split("/")[-2:]),
            "digest": digest[:_SHORT],
            "source_type": "maskray",
            "source": json.dumps({"uri": uri, "manifest": digest}),
        }
        if images:
            dataset["profile"] = json.dumps({"images": int(images)})
        inputs.append(
            {"tags": [{"key": "mlflow.data.context", "value": context}], "dataset": dataset}
        )
    return inputs


def _origin(study: StudyBrief, tags: Mapping[str, str]) -> dict[str, str]:
    """Columns that MLflow has of its own: who made the run, and from which source and version."""
    package = tags.get("maskray.code", study.code)[:_SHORT]
    known = {
        "mlflow.user": study.owner,
        "mlflow.source.name": f"maskray code package {package}" if package else "",
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": tags.get("maskray.commit", ""),
    }
    return {key: value for key, value in known.items() if value}


def _description(spec: Study, trial: TrialRow) -> str:
    """The arm's overrides, as Markdown."""
    lines = [f"**{arm_name(trial.arm)}**, seed {trial.seed}{', baseline' * trial.baseline}", ""]
    for factor, level in trial.arm.items():
        for path, value in spec.factors.get(factor, {}).get(level, {}).items():
            lines.append(f"- `{path}: {json.dumps(value)}`")
    if trial.cached_from:
        lines += ["", f"Its result is that of trial `{trial.cached_from}`, which has the curves."]
    return "\n".join(lines)


def _primary(spec: Study) -> str:
    return primary_of(spec, spec.metrics)


def _keys(names: Sequence[str]) -> list[str]:
    return list(tracker_keys(list(dict.fromkeys(names))).values())
