"""A study's contrasts as weights of its arms.

Names and forms are checked when the file is read; whether the arms exist and have the metric, when
the study is expanded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from contract.metrics import check_metric
from contract.record import nearest
from contract.study import Contrast, Difference, Expected, Study

Levels = Mapping[str, Mapping[str, object]]  # factor -> level -> its overrides
BASELINE = "baseline"
_SMALL = 1e-9  # a weight that is nothing but the rounding of a sum


@dataclass(frozen=True)
class Asked:
    """One contrast of the family. weights: arm's name -> weight; the others are 0. margin: points.

    of, minus: the two sides in words.
    """

    name: str
    metric: str
    weights: Mapping[str, float]
    of: str
    minus: str
    expected: Expected = ""
    margin: float = 0.0


def arm_name(arm: Mapping[str, str]) -> str:
    """ "roi=align,masks=sigmoid", or "baseline" where there are no factors."""
    return ",".join(f"{factor}={level}" for factor, level in arm.items()) or BASELINE


def primary_of(study: Study, computed: Collection[str]) -> str:
    """The metric that arms are compared by where a contrast names none."""
    columns = (metric for metric in study.metrics if metric in computed)
    # A study that an older version accepted may list no metric.
    return study.primary or next(columns, next(iter(study.metrics), "bbox/AP"))


def family_of(
    study: Study,
    arms: Sequence[Mapping[str, str]],
    baseline: Mapping[str, str] | None,
    primary: str,
) -> list[Asked]:
    """The study's contrasts; by default each arm minus the baseline by the primary metric.

    Raises ValueError of one line for a contrast that these arms do not have.
    """
    if study.contrasts:
        return [
            _asked(study, name, contrast, arms, baseline, primary)
            for name, contrast in study.contrasts.items()
        ]
    if baseline is None:
        return []
    reference = arm_name(baseline)
    return [
        Asked(
            arm_name(arm),
            primary,
            {arm_name(arm): 1.0, reference: -1.0},
            arm_name(arm),
            reference,
        )
        for arm in arms
        if arm != baseline
    ]


def check_forms(study: Study) -> None:
    """Raises ValueError of one line for a contrast that no arms of this study could fit."""
    if not study.metrics:
        raise ValueError("metrics: is empty; name at least one, such as segm/AP")
    if study.primary:
        check_metric(study.primary, "primary")
    for name, text in study.arms.items():
        if name == BASELINE:
            raise ValueError(f"arms.{name}: means the baseline's arm already; choose another name")
        if not parse_arm(text, study.factors, f"arms.{name}"):
            raise ValueError(f"arms.{name}: is empty; write factor=level")
    for name, contrast in study.contrasts.items():
        where = f"contrasts.{name}"
        if contrast.metric:
            check_metric(contrast.metric, f"{where}.metric")
        for side, text in _texts(contrast, where):
            _wanted(study, text, side)


def check_family(
    study: Study,
    arms: Sequence[Mapping[str, str]],
    baseline: Mapping[str, str],
    metrics: Sequence[Sequence[str]],
) -> None:
    """Raises ValueError of one line for a contrast whose arms do not have its metric.

    metrics: those of each arm, in the arms' order.
    """
    computed = {arm_name(arm): set(names) for arm, names in zip(arms, metrics, strict=True)}
    everything = set().union(*computed.values())
    if study.metrics != Study.model_fields["metrics"].default:  # which serves boxes alone too
        for metric in study.metrics:
            if metric not in everything:
                near = nearest(metric, everything)
                raise ValueError(f"metrics: no arm of this study has {metric!r}; {near}")
    if study.primary and study.primary not in everything:
        raise ValueError(f"primary: no arm of this study has {study.primary!r}")
    if not study.contrasts:
        return  # by default, arms without the primary metric are left out
    seen: dict[tuple[str, tuple[tuple[str, float], ...]], str] = {}
    for asked in family_of(study, arms, baseline, primary_of(study, everything)):
        for arm in asked.weights:
            if asked.metric not in computed[arm]:
                raise ValueError(
                    f"contrasts.{asked.name}: the arm {arm} has no {asked.metric!r}; "
                    f"{nearest(asked.metric, computed[arm])}"
                )
        key = asked.metric, tuple(sorted(asked.weights.items()))
        if key in seen:
            raise ValueError(f"contrasts.{asked.name}: asks the same as {seen[key]}; keep one")
        seen[key] = asked.name


def parse_arm(text: str, factors: Levels, where: str) -> dict[str, str]:
    """ "factor=level,factor=level" as a mapping; a factor that it leaves out matches every level.

    Raises ValueError for a factor or a level that the study does not have.
    """
    arm: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        factor, separator, level = (piece.strip() for piece in part.partition("="))
        if not separator or factor not in factors:
            raise ValueError(f"{where}: {part!r} is not 'factor=level'; {nearest(factor, factors)}")
        levels = factors[factor]
        if level not in levels:
            raise ValueError(f"{where}: {factor} has no level {level!r}; {nearest(level, levels)}")
        arm[factor] = level
    return arm


# --- sides --------------------------------------------------------------------------------------


def _asked(
    study: Study,
    name: str,
    contrast: Contrast,
    arms: Sequence[Mapping[str, str]],
    baseline: Mapping[str, str] | None,
    primary: str,
) -> Asked:
    where = f"contrasts.{name}"
    weights: dict[str, float] = {}
    for text, sign, side in _signed(contrast, where):
        chosen = _arms_of(study, text, side, arms, baseline)
        for arm in chosen:
            weights[arm] = weights.get(arm, 0.0) + sign / len(chosen)
    weights = {arm: weight for arm, weight in weights.items() if abs(weight) > _SMALL}
    if not weights:
        raise ValueError(f"{where}: both sides are the same")
    total = sum(weights.values())
    if abs(total) > _SMALL:
        raise ValueError(f"{where}: is no difference: the weights of its arms add up to {total:+g}")
    metric = contrast.metric or primary
    words = _words(contrast.of), _words(contrast.minus)
    return Asked(name, metric, weights, *words, contrast.expected, contrast.margin)


def _signed(side: Difference | str, where: str, sign: float = 1.0) -> list[tuple[str, float, str]]:
    """Each arm's text with its sign and its place in the file."""
    if isinstance(side, str):
        return [(side, sign, where)]
    return [
        *_signed(side.of, f"{where}.of", sign),
        *_signed(side.minus, f"{where}.minus", -sign),
    ]


def _texts(contrast: Contrast, where: str) -> list[tuple[str, str]]:
    return [(place, text) for text, _, place in _signed(contrast, where)]


def _words(side: Difference | str) -> str:
    if isinstance(side, str):
        return side
    return f"({_words(side.of)} - {_words(side.minus)})"


def _arms_of(
    study: Study,
    text: str,
    where: str,
    arms: Sequence[Mapping[str, str]],
    baseline: Mapping[str, str] | None,
) -> list[str]:
    if text == BASELINE and baseline is not None:
        return [arm_name(baseline)]
    wanted = _wanted(study, text, where).items()
    chosen = [arm_name(arm) for arm in arms if wanted <= arm.items()]
    if not chosen:
        raise ValueError(f"{where}: the design has no arm {text!r}")
    return chosen


def _wanted(study: Study, text: str, where: str) -> dict[str, str]:
    """The levels that an arm must have to be meant by `text`."""
    if text == BASELINE:
        return {}
    if text in study.arms:
        return parse_arm(study.arms[text], study.factors, f"arms.{text}")
    if "=" in text:
        return parse_arm(text, study.factors, where)
    factors = [factor for factor, levels in study.factors.items() if text in levels]
    if len(factors) > 1:
        raise ValueError(
            f"{where}: {text!r} is a level of {' and of '.join(factors)}; write {factors[0]}={text}"
        )
    if not factors:
        known = {
            *study.arms,
            BASELINE,
            *(name for levels in study.factors.values() for name in levels),
        }
        raise ValueError(f"{where}: no arm {text!r}; {nearest(text, known)}")
    return {factors[0]: text}
