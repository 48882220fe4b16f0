"""From a study to its trials: arms, seeds, identities. Errors are one line for the person."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from contract.fit import check_fit, same_data
from contract.metrics import metric_names
from contract.recipe import RunConfig
from contract.study import TRAINING_TAG, Looks, Study, TrialPlan
from orchestrator.study.baseline import BaselineRun, Overrides
from orchestrator.study.code_package import CodePackage
from orchestrator.study.contrasts import arm_name, check_family
from orchestrator.study.datasets import Manifest, read_manifest
from orchestrator.study.identity import (
    canonical,
    identity,
    proposals_identity,
    training_identity,
    trains_batch_norm,
    weights_identity,
    weights_recipe,
)
from orchestrator.study.meaning.reach import own_meaning
from orchestrator.study.read import check_study

# Far above any study that people run; a slip in the seeds must not fill the ledger.
MAX_TRIALS = 10_000
# read by the report, to compare with the paper's data
TRAIN_IMAGES_TAG, VAL_IMAGES_TAG = "maskray.train_images", "maskray.val_images"

# Fields that count only beside another field's value: path -> (the other path, its value).
CONDITIONAL = {
    "data.mask_crop_side": ("model.mask.kind", "mask"),
    "loop.guard.rate_factor": ("loop.guard.action", "lower_rate"),
}

Arm = dict[str, str]  # factor -> level


@dataclass(frozen=True)
class Expansion:
    """The trials in the table's order, the baseline arm included; the report shows `warnings`."""

    trials: tuple[TrialPlan, ...]
    warnings: tuple[str, ...]


def expand(study: Study, *, data: str = "", root: Path, code: CodePackage) -> Expansion:
    """Every trial of the study, checked against its datasets.

    data: a folder or URI whose `train` and `val` replace the baseline's. root: where relative paths
    start. Raises ValueError for what cannot run or makes no sense.
    """
    check_study(study)
    base = BaselineRun.of(study, root, data)
    _refuse_inert(base.run, study.baseline.set, "baseline.set")
    references = {factor: _reference(study, factor, base) for factor in study.factors}
    arms = _arms(study, references)
    if len(arms) * len(study.every_seed) > MAX_TRIALS:
        raise ValueError(
            f"{len(arms)} arms x {len(study.every_seed)} seeds are more than {MAX_TRIALS:,} trials"
        )
    runs = [_run_of(study, arm, base) for arm in arms]
    if study.control == "same_arm":
        _require_twins(study, arms, runs)
    else:
        _refuse_twins(arms, runs)
    check_family(
        study, arms, references, [metric_names(run.model, run.loop.eval_boundary) for run in runs]
    )
    manifest = cache(read_manifest)  # most arms share their datasets, which may lie in a bucket
    trials: list[TrialPlan] = []
    doubts: list[str] = []
    for number, (arm, run) in enumerate(zip(arms, runs, strict=True)):
        try:
            train, val = manifest(run.data.train, "data.train"), manifest(run.data.val, "data.val")
            check_fit(run, train.header, val.header)
            doubts.append(same_data(run, train.hash, val.hash))
            _check_ranks(study, run)
            seeds = _seeds(study, number)
            trials += _trials(study, arm, arm == references, run, seeds, train, val, code)
        except ValueError as error:
            raise ValueError(f"arm {arm_name(arm)}: {error}") from None
    _refuse_same_identity(trials)
    told = list(dict.fromkeys(doubt for doubt in doubts if doubt))
    return Expansion(tuple(trials), (*_warnings(arms, runs), *told))


# --- arms -------------------------------------------------------------------------------------


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


def _reference(study: Study, factor: str, base: BaselineRun) -> str:
    """The level that leaves the baseline as it is, or the first one.

    A level may need another factor's level to be valid, so one that fits alone is enough. Raises
    ValueError if none does.
    """
    unchanged: list[str] = []
    errors: list[str] = []
    for level, overrides in study.factors[factor].items():
        try:
            if base.arm(overrides, f"factors.{factor}.{level}") == base.run:
                unchanged.append(level)
        except ValueError as error:
            errors.append(str(error))
    if len(errors) == len(study.factors[factor]):
        more = "" if len(errors) == 1 else f" (no level of {factor!r} fits the baseline)"
        raise ValueError(f"{errors[0]}{more}")
    if len(unchanged) > 1 and study.control == "none":
        raise ValueError(
            f"factors.{factor}: the levels {unchanged[0]!r} and {unchanged[1]!r} both leave the "
            "baseline as it is, so their trials would be the same run; keep one "
            "(a study that compares a run with itself says control: same_arm)"
        )
    return unchanged[0] if unchanged else next(iter(study.factors[factor]))


def _run_of(study: Study, arm: Arm, base: BaselineRun) -> RunConfig:
    """The arm's run: the overrides of all its levels on the baseline."""
    overrides: dict[str, Any] = {}
    for factor, level in arm.items():
        for path, value in study.factors[factor][level].items():
            if path in overrides and overrides[path] != value:
                # Either order of the two would hide one level from the table that names it.
                raise ValueError(
                    f"arm {arm_name(arm)}: two of its levels set {path} to different values; "
                    "let one do it"
                )
            overrides[path] = value
    where = f"arm {arm_name(arm)}" if arm else "baseline"
    run = base.arm(overrides, where)
    _refuse_inert(run, overrides, where)
    return run


# --- what makes no sense ----------------------------------------------------------------------


def _refuse_inert(run: RunConfig, overrides: Overrides, where: str) -> None:
    """A level that changes nothing would still be a row of the table, with a verdict on it."""
    for path in overrides:
        if path not in CONDITIONAL:
            continue
        other, needed = CONDITIONAL[path]
        value = attrgetter(other)(run)
        if value != needed:
            raise ValueError(
                f"{where}: {path}: has no effect while {other} is {value!r}, not {needed!r}"
            )


def _refuse_twins(arms: Sequence[Arm], runs: Sequence[RunConfig]) -> None:
    seen: dict[str, Arm] = {}
    for arm, run in zip(arms, runs, strict=True):
        # As text: a record of somebody's own tree may hold a list, which has no hash.
        text = canonical(run.model_dump(mode="json"))
        if text in seen:
            raise ValueError(
                f"the arms {arm_name(seen[text])} and {arm_name(arm)} come out as the same run; "
                "check the overrides of the levels in which they differ"
            )
        seen[text] = arm


def _require_twins(study: Study, arms: Sequence[Arm], runs: Sequence[RunConfig]) -> None:
    if isinstance(study.seeds, Looks):
        raise ValueError(
            "control: same_arm deals every arm seeds of its own, which looks do not know; "
            "give seeds as a list"
        )
    if len(arms) < 2:
        raise ValueError(
            "control: same_arm compares a run with itself; give a factor two levels without "
            "overrides, such as copy: {first: {}, second: {}}"
        )
    for arm, run in zip(arms, runs, strict=True):
        if run != runs[0]:
            raise ValueError(
                f"control: same_arm: the arms {arm_name(arms[0])} and {arm_name(arm)} are not the "
                "same run; leave their levels empty, or leave out control"
            )


def _seeds(study: Study, number: int) -> list[int]:
    """The seeds of the arm of this number: the study's, or its own.

    Two arms that are one run must share no seed: the second one would be a copy of the first.
    """
    offset = number * (max(study.every_seed) + 1) if study.control == "same_arm" else 0
    return [seed + offset for seed in study.every_seed]


def _refuse_same_identity(trials: Sequence[TrialPlan]) -> None:
    """Records may differ in where data or weights lie and still name the same bytes."""
    seen: dict[str, str] = {}
    for trial in trials:
        if trial.identity in seen:
            raise ValueError(
                f"the trials {seen[trial.identity]} and {trial.key} come out as the same run: "
                "the files in which they differ have the same content"
            )
        seen[trial.identity] = trial.key


def _check_ranks(study: Study, run: RunConfig) -> None:
    if study.resources.ranks > run.loop.global_batch:
        raise ValueError(
            f"loop.global_batch: {run.loop.global_batch} images a step cannot be shared by "
            f"{study.resources.ranks} ranks; lower resources.ranks"
        )


# --- trials -----------------------------------------------------------------------------------


def _trials(
    study: Study,
    arm: Arm,
    is_baseline: bool,
    run: RunConfig,
    seeds: Sequence[int],
    train: Manifest,
    val: Manifest,
    code: CodePackage,
) -> list[TrialPlan]:
    """The arm once for each seed."""
    weights, proposals = weights_identity(run.model), proposals_identity(run.model)
    reached = own_meaning().of(run)  # we run in the study's own code
    tags = {
        "maskray.code": code.sha256,
        "maskray.code_origin": code.origin,
        "maskray.commit": code.commit,
        "maskray.sources": code.source_hash,
        "maskray.manifest_train": train.hash,
        "maskray.manifest_val": val.hash,
        TRAIN_IMAGES_TAG: str(train.header.num_images),
        VAL_IMAGES_TAG: str(val.header.num_images),
        "maskray.weights": weights,
        "maskray.proposals": proposals,
    }
    tags = {name: value for name, value in tags.items() if value}
    plans = []
    for seed in seeds:
        seeded = run.model_copy(update={"seed": seed})
        training = training_identity(
            seeded,
            manifest=train.hash,
            weights=weights,
            proposals=proposals,
            code=reached,
            ranks=study.resources.ranks,
        )
        plans.append(
            TrialPlan(
                key=f"{arm_name(arm)}/seed-{seed}",
                arm=arm,
                seed=seed,
                baseline=is_baseline,
                identity=identity(
                    seeded,
                    manifests=(train.hash, val.hash),
                    weights=weights,
                    proposals=proposals,
                    code=reached,
                    ranks=study.resources.ranks,
                ),
                # Whole, with its defaults: the code that runs it may have others.
                run=seeded.model_dump(mode="json"),
                tags=tags | ({TRAINING_TAG: training} if training else {}),
            )
        )
    return plans


def _warnings(arms: Sequence[Arm], runs: Sequence[RunConfig]) -> list[str]:
    """What runs, and still makes arms or studies hard to compare."""
    warnings: list[str] = []
    recipes: dict[str, list[str]] = {}
    for arm, run in zip(arms, runs, strict=True):
        recipes.setdefault(weights_recipe(run.model), []).append(arm_name(arm))
    if len(recipes) > 1:
        parts = "; ".join(f"{recipe}: {', '.join(names)}" for recipe, names in recipes.items())
        warnings.append(
            f"the arms start from weights of different recipes, which moves AP by itself ({parts})"
        )
    if any(trains_batch_norm(run) for run in runs):
        warnings.append(
            "trained batch-norm takes its statistics per rank: "
            "these numbers depend on the number of ranks"
        )
    return warnings
