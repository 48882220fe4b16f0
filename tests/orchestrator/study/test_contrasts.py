"""A study's contrasts as weights of its arms, and those that its arms cannot answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contract.study import Study
from orchestrator.study.contrasts import Asked, family_of, primary_of
from orchestrator.study.expand import expand
from tests.orchestrator.studies import CODE, tiny_study, write_dataset

ONOFF = {
    "masks": {"off": {"model.mask.kind": "none"}, "on": {"model.mask.kind": "mask"}},
    "roi": {"align": {}, "pool": {"model.roi.kind": "pool"}},
}
ARMS = [{"masks": m, "roi": r} for m in ("off", "on") for r in ("align", "pool")]
BASE = {"masks": "on", "roi": "align"}


def asked(contrast: dict[str, Any], **fields: Any) -> Asked:
    study = tiny_study(ONOFF, contrasts={"c": contrast}, **fields)
    (only,) = family_of(study, ARMS, BASE, "bbox/AP")
    return only


def test_a_side_is_a_name_a_level_a_full_arm_or_the_baseline() -> None:
    weights = {"masks=on,roi=pool": 1.0, "masks=on,roi=align": -1.0}
    arms = {"mine": "roi=pool,masks=on"}
    for of in ("mine", "masks=on,roi=pool"):
        for minus in ("baseline", "roi=align, masks=on"):
            assert asked({"of": of, "minus": minus}, arms=arms).weights == weights


def test_a_level_alone_is_the_mean_over_the_other_factors() -> None:
    assert asked({"of": "pool", "minus": "roi=align"}).weights == {
        "masks=off,roi=pool": 0.5,
        "masks=on,roi=pool": 0.5,
        "masks=off,roi=align": -0.5,
        "masks=on,roi=align": -0.5,
    }


def test_differences_of_differences() -> None:
    sides = {
        "of": {"of": "masks=on,roi=pool", "minus": "masks=on,roi=align"},
        "minus": {"of": "masks=off,roi=pool", "minus": "masks=off,roi=align"},
    }
    interaction = asked({**sides, "metric": "segm/AP", "margin": 1.0})
    assert interaction.weights == {
        "masks=on,roi=pool": 1.0,
        "masks=on,roi=align": -1.0,
        "masks=off,roi=pool": -1.0,
        "masks=off,roi=align": 1.0,
    }
    assert (interaction.metric, interaction.margin) == ("segm/AP", 1.0)
    assert interaction.minus == "(masks=off,roi=pool - masks=off,roi=align)"


def test_by_default_each_arm_minus_the_baseline() -> None:
    family = family_of(tiny_study(ONOFF), ARMS, BASE, "bbox/AP")
    assert [(one.of, one.minus) for one in family] == [
        ("masks=off,roi=align", "masks=on,roi=align"),
        ("masks=off,roi=pool", "masks=on,roi=align"),
        ("masks=on,roi=pool", "masks=on,roi=align"),
    ]


def test_the_primary_metric_is_the_first_column_that_there_is() -> None:
    study = tiny_study(metrics=["segm/AP", "bbox/AP75", "bbox/AP"])
    assert primary_of(study, ["bbox/AP", "bbox/AP75"]) == "bbox/AP75"
    assert primary_of(tiny_study(primary="bbox/AP50"), ["bbox/AP"]) == "bbox/AP50"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"contrasts": {"c": {"of": "pool", "minus": "roi=align", "metric": "segm/AP"}}},
            "contrasts.c: the arm masks=off,roi=pool has no 'segm/AP'; there are bbox/AP, ",
        ),
        (
            {"contrasts": {"c": {"of": "pool", "minus": "roi=pool"}}},
            "contrasts.c: both sides are the same",
        ),
        (
            {"contrasts": {"c": {"of": {"of": "pool", "minus": "align"}, "minus": "baseline"}}},
            "contrasts.c: is no difference: the weights of its arms add up to -1",
        ),
        (
            {
                "contrasts": {
                    "c": {"of": "pool", "minus": "align"},
                    "d": {"of": "roi=pool", "minus": "roi=align"},
                }
            },
            "contrasts.d: asks the same as c; keep one",
        ),
        (
            {
                "design": "one_at_a_time",
                "contrasts": {"c": {"of": "masks=off,roi=pool", "minus": "baseline"}},
            },
            "contrasts.c.of: the design has no arm 'masks=off,roi=pool'",
        ),
        ({"primary": "keypoints/AP"}, "primary: no arm of this study has 'keypoints/AP'"),
        ({"metrics": ["keypoints/AP"]}, "metrics: no arm of this study has 'keypoints/AP'"),
    ],
)
def test_what_the_arms_cannot_answer_is_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    study = tiny_study(ONOFF, **fields)
    with pytest.raises(ValueError, match=r"no arm|contrasts") as caught:
        expand(study, data=str(write_dataset(tmp_path)), root=tmp_path, code=CODE)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_study_of_an_older_version_has_the_defaults() -> None:
    old = {"name": "s", "baseline": {"preset": "tiny"}}
    study = Study.model_validate(old)
    assert (study.primary, study.contrasts, study.variance, study.learned_ap) == (
        "",
        {},
        "pooled",
        10.0,
    )
    assert study.sparse() == {"name": "s", "baseline": {"preset": "tiny"}}
