"""From a study to its trials: arms, seeds, identities. What a person got wrong is said here, in one line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from contract.files import join
from contract.model import VGG16, BatchNorm
from contract.recipe import RunConfig, apply_overrides, parse_run
from contract.study import Study, TrialPlan
from orchestrator.study.code_package import CodePackage
from orchestrator.study.datasets import Manifest, absolute, check_fit, read_manifest
from orchestrator.study.identity import (
    canonical,
    identity,
    proposals_identity,
    weights_identity,
    weights_recipe,
)
from orchestrator.study.read import baseline_run, check_paths, check_study, complete

MAX_TRIALS = 10_000

# Fields that count only beside another field's value: path -> (the other path, its value).
CONDITIONAL = {
    "data.mask_crop_side": ("model.mask.kind", "mask"),
    "loop.guard.rate_factor": ("loop.guard.action", "lower_rate"),
}

Arm = dict[str, str]
Nested = dict[str, Any]


@dataclass(frozen=True)
class Expansion:
    """The trials in the order of the table, baseline arm included; `warnings` go into the report."""

    trials: tuple[TrialPlan, ...]
    warnings: tuple[str, ...]


def expand(study: Study, *, data: str = "", root: Path, code: CodePackage) -> Expansion:
    """Every trial of the study, checked against its datasets. Raises ValueError for what cannot run or makes no sense.

    data: a folder or URI whose `train` and `val` replace the baseline's. root: where relative paths start.
    """
    check_study(study)
    base = baseline_run(study, root)
    if data:
        base = apply_overrides(
            base, {"data.train": join(data, "train"), "data.val": join(data, "val")}
        )
    _refuse_inert(base, study.baseline.set, "baseline.set")
    references = {factor: _reference(study, factor, base) for factor in study.factors}
    arms = _arms(study, references)
    if len(arms) * len(study.seeds) > MAX_TRIALS:
        raise ValueError(
            f"{len(arms)} arms x {len(study.seeds)} seeds are more than {MAX_TRIALS:,} trials"
        )
    runs = [_run_of(study, arm, base, root) for arm in arms]
    _refuse_twins(arms, runs)
    manifest = cache(read_manifest)
    trials: list[TrialPlan] = []
    for arm, run in zip(arms, runs, strict=True):
        where = f"arm {arm_name(arm)}"
        try:
            train, val = manifest(run.data.train, "data.train"), manifest(run.data.val, "data.val")
            check_fit(run, train, val)
            if study.resources.ranks > run.loop.global_batch:
                raise ValueError(
                    f"loop.global_batch: {run.loop.global_batch} images a step cannot be shared by "
                    f"{study.resources.ranks} ranks; lower resources.ranks"
                )
            trials += _trials(study, arm, arm == references, run, train, val, code)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    _refuse_same_identity(trials)
    return Expansion(tuple(trials), tuple(_warnings(arms, runs)))


def arm_name(arm: Mapping[str, str]) -> str:
    """ "roi=align,masks=sigmoid", or "baseline" where there are no factors."""
    return ",".join(f"{factor}={level}" for factor, level in arm.items()) or "baseline"


def _arms(study: Study, references: Arm) -> list[Arm]:
    levels = {factor: list(study.factors[factor]) for factor in study.factors}
    if study.design == "grid":
        return [
            dict(zip(levels, chosen, strict=True)) for chosen in itertools.product(*levels.values())
        ]
    arms = [dict(references)]
    for factor, names in levels.items():
        arms += [{**references, factor: name} for name in names if name != references[factor]]
    return arms


def _reference(study: Study, factor: str, base: Nested) -> str:
    """The level that leaves the baseline as it is, or the first. Raises ValueError if the factor fits no run at all."""
    unchanged: list[str] = []
    errors: list[str] = []
    for level, overrides in study.factors[factor].items():
        where = f"factors.{factor}.{level}"
        try:
            if complete(apply_overrides(base, check_paths(overrides, where)), where) == base:
                unchanged.append(level)
        except ValueError as error:
            errors.append(str(error))
    if len(errors) == len(study.factors[factor]):
        more = "" if len(errors) == 1 else f" (no level of {factor!r} fits the baseline)"
        raise ValueError(f"{errors[0]}{more}")
    if len(unchanged) > 1:
        raise ValueError(
            f"factors.{factor}: the levels {unchanged[0]!r} and {unchanged[1]!r} both leave the baseline as it is, "
            "so their trials would be the same run; keep one"
        )
    return unchanged[0] if unchanged else next(iter(study.factors[factor]))


def _run_of(study: Study, arm: Arm, base: Nested, root: Path) -> RunConfig:
    """The arm's run with absolute paths, seed 0."""
    overrides: Nested = {}
    for factor, level in arm.items():
        for path, value in study.factors[factor][level].items():
            if path in overrides and overrides[path] != value:
                raise ValueError(
                    f"arm {arm_name(arm)}: two of its levels set {path} to different values; let one do it"
                )
            overrides[path] = value
    where = f"arm {arm_name(arm)}" if arm else "baseline"
    run = complete(apply_overrides(base, overrides), where)
    _refuse_inert(run, overrides, where)
    places = {"data.train": run["data"]["train"], "data.val": run["data"]["val"]}
    if run["model"]["weights"]["kind"] == "file":
        places["model.weights.path"] = run["model"]["weights"]["path"]
    if run["model"]["proposals"]["kind"] == "fixed":
        places["model.proposals.uri"] = run["model"]["proposals"]["uri"]
    return parse_run(
        apply_overrides(run, {path: absolute(uri, root) for path, uri in places.items()}), where
    )


def _refuse_inert(run: Nested, overrides: Mapping[str, Any], where: str) -> None:
    for path in overrides:
        other, value = CONDITIONAL.get(path, ("", None))
        if other and _at(run, other) != value:
            raise ValueError(
                f"{where}: {path}: has no effect while {other} is {_at(run, other)!r}, not {value!r}"
            )


def _at(run: Nested, path: str) -> Any:
    node: Any = run
    for part in path.split("."):
        node = node[part]
    return node


def _refuse_twins(arms: Sequence[Arm], runs: Sequence[RunConfig]) -> None:
    seen: dict[str, Arm] = {}
    for arm, run in zip(arms, runs, strict=True):
        text = canonical(run.model_dump(mode="json"))
        if text in seen:
            raise ValueError(
                f"the arms {arm_name(seen[text])} and {arm_name(arm)} come out as the same run; "
                "check the overrides of the levels in which they differ"
            )
        seen[text] = arm


def _refuse_same_identity(trials: Sequence[TrialPlan]) -> None:
    """Records may differ in where data or weights lie and still name the same bytes."""
    seen: dict[str, str] = {}
    for trial in trials:
        if trial.identity in seen:
            raise ValueError(
                f"the trials {seen[trial.identity]} and {trial.key} come out as the same run: the files in which they "
                "differ have the same content"
            )
        seen[trial.identity] = trial.key


def _trials(
    study: Study,
    arm: Arm,
    is_baseline: bool,
    run: RunConfig,
    train: Manifest,
    val: Manifest,
    code: CodePackage,
) -> list[TrialPlan]:
    weights, proposals = weights_identity(run.model), proposals_identity(run.model)
    tags = {
        "maskray.code": code.sha256,
        "maskray.code_origin": code.origin,
        "maskray.commit": code.commit,
        "maskray.sources": code.source_hash,
        "maskray.manifest_train": train.hash,
        "maskray.manifest_val": val.hash,
        "maskray.val_images": str(val.header.num_images),
        "maskray.weights": weights,
        "maskray.proposals": proposals,
    }
    plans = []
    for seed in study.seeds:
        seeded = run.model_copy(update={"seed": seed})
        name = identity(
            seeded,
            manifests=(train.hash, val.hash),
            weights=weights,
            proposals=proposals,
            source_hash=code.source_hash,
            ranks=study.resources.ranks,
        )
        plans.append(
            TrialPlan(
                key=f"{arm_name(arm)}/seed-{seed}",
                arm=arm,
                seed=seed,
                baseline=is_baseline,
                identity=name,
                run=seeded.model_dump(mode="json"),
                tags={key: value for key, value in tags.items() if value},
            )
        )
    return plans


def _warnings(arms: Sequence[Arm], runs: Sequence[RunConfig]) -> list[str]:
    found: list[str] = []
    recipes: dict[str, list[str]] = {}
    for arm, run in zip(arms, runs, strict=True):
        recipes.setdefault(weights_recipe(run.model), []).append(arm_name(arm))
    if len(recipes) > 1:
        parts = "; ".join(f"{recipe}: {', '.join(names)}" for recipe, names in recipes.items())
        found.append(
            f"the arms start from weights of different recipes, which moves AP by itself ({parts})"
        )
    if any(
        not isinstance(run.model.backbone, VGG16) and isinstance(run.model.backbone.norm, BatchNorm)
        for run in runs
    ):
        found.append(
            "trained batch-norm takes its statistics per rank: these numbers depend on the number of ranks"
        )
    return found
