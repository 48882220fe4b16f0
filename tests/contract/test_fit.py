"""Partners of keypoints in a mirrored image, by the ways in which people write sides."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from contract.data import ManifestHeader
from contract.fit import check_fit, flip_in_words, mirrored
from tests.builders import tiny_run


@pytest.mark.parametrize(
    "names",
    [
        ["nose", "left_eye", "right_eye"],
        ["nose", "eye_left", "eye_right"],
        ["nose", "left eye", "right eye"],
        ["nose", "left-eye", "right-eye"],
        ["nose", "leftEye", "rightEye"],
        ["nose", "LeftEye", "RightEye"],
        ["nose", "LEFT EYE", "RIGHT EYE"],
        ["nose", "lefteye", "righteye"],
        ["nose", "l_eye", "r_eye"],
        ["nose", "L-Eye", "R-Eye"],
        ["nose", "eye.l", "eye.r"],
        ["nose", "eye (L)", "eye (R)"],
        ["nose", "lEye", "rEye"],
        ["LIPS", "LEye", "REye"],
        ["nose", "eyeL", "eyeR"],
        ["nose", "L1", "R1"],
    ],
)
def test_the_usual_spellings_of_sides_pair(names):
    assert mirrored(names, None) == (0, 2, 1)


@pytest.mark.parametrize(
    "names", [["tail"], ["ear", "left_eye", "right_eye"], ["roll", "l1", "r1"]]
)
def test_what_has_no_side_stays(names):
    assert mirrored(names, None)[0] == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p1", "p2", "p3"], r"no side in the names of the keypoints \(p1, p2, p3\); name the"),
        (["left_eye", "nose"], "keypoint 'left_eye' has a side and no partner on the other; name"),
        (["lewe_oko", "prawe_oko"], "no side in the names"),
        (["L1", "L2", "L3"], "no side in the names"),
    ],
)
def test_a_flip_that_nobody_can_pair_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        mirrored(names, None)


def test_what_a_flip_swaps_is_told_with_what_it_leaves():
    """Names of which we see some sides and not others: a person sees the ears."""
    names = ["nose", "left_eye", "right_eye", "links_ohr", "rechts_ohr"]
    told = "a flip swaps left_eye with right_eye and leaves nose, links_ohr, rechts_ohr in place"
    assert flip_in_words(names, mirrored(names, None)) == told
    assert flip_in_words(["l", "r"], (1, 0)) == "a flip swaps l with r"
    assert flip_in_words(["tail"], (0,)) == "a flip leaves tail in place"


def test_stated_pairs_hold():
    names = ["lewe_oko", "nos", "prawe_oko"]
    assert mirrored(names, [("lewe_oko", "prawe_oko")]) == (2, 1, 0)
    assert mirrored(["left_eye", "right_eye"], []) == (0, 1)  # they say that none swaps
    with pytest.raises(ValueError, match="no keypoint 'oko' in the data; there are lewe_oko, nos"):
        mirrored(names, [("oko", "nos")])
    with pytest.raises(ValueError, match="a keypoint stands in two pairs"):
        mirrored(names, [("lewe_oko", "nos"), ("nos", "prawe_oko")])


def header_of(*categories: dict[str, Any]) -> ManifestHeader:
    return ManifestHeader(
        schema_version=1,
        num_images=1,
        num_annotations=1,
        num_shards=1,
        categories=categories,
        has_masks=True,
        has_keypoints=False,
    )


def test_a_category_that_heads_the_others_gets_a_remedy_that_works():
    header = header_of(
        {"id": 0, "name": "fish", "supercategory": "none"},
        {"id": 1, "name": "cod", "supercategory": "fish"},
        {"id": 2, "name": "bass, black", "supercategory": "fish"},
        {"id": 3, "name": "eel", "supercategory": ["odd"]},
    )
    run = tiny_run({"model.num_classes": 3})
    with pytest.raises(ValueError, match=r"set model\.num_classes=4, or") as caught:
        check_fit(run, header, header)
    field, _, value = str(caught.value).rpartition("with ")[2].partition("=")
    check_fit(tiny_run({"model.num_classes": 3, field: yaml.safe_load(value)}), header, header)
    check_fit(tiny_run({"model.num_classes": 4}), header, header)
