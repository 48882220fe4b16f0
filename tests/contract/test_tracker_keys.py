"""Any name becomes a key that MLflow takes, and no two names the same one."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric, _validate_param_name, _validate_tag_name

from contract.metrics import category_keys, renamed, tag_condition, tracker_keys

NAMES = st.sets(st.text(max_size=300) | st.text("./:a_(", max_size=6), max_size=8)


def test_a_valid_name_is_its_own_key():
    names = ["bbox/AP", "loss/mask", "maskray.arm.roi", "a b:c-d", "größe", "a..b", ".hidden"]
    assert tracker_keys(names) == {name: name for name in names}


def test_names_that_mlflow_refuses_stay_readable():
    assert tracker_keys(["rate (x2)", "..", "/a//b/", "", "bbox/AP/.."]) == {
        "rate (x2)": "rate _x2_",
        "..": "__",
        "/a//b/": "a/b",
        "": "_",
        "bbox/AP/..": "bbox/AP/__",
    }


def test_categories_that_would_share_a_key_are_told_apart_whatever_others_there_are():
    keys = category_keys(["a/b", "a:b", "a_b", "cat", ".."])
    assert keys["a_b"] == "a_b"
    assert keys["cat"] == "cat"
    assert keys[".."] == "__"
    assert len(set(keys.values())) == 5
    assert keys["a/b"] == category_keys(["a/b", "a:b"])["a/b"]
    assert renamed(keys).startswith("'a/b' as 'a_b-")


@given(NAMES)
@example({"a" * 250, "a" * 251, "a" * 252, "/" * 300, "x" * 248 + "/.y"})
@example({"..", ".", "", "a\n", "\ud800", "..a", "a/../b", "../a"})
def test_every_key_is_one_that_mlflow_takes_and_is_unique(names):
    keys = tracker_keys(names)
    parts = {f"keypoints/AP/{part}" for part in category_keys(names).values()}
    assert len(set(keys.values())) == len(parts) == len(names)
    for key in {*keys.values(), *parts}:
        _validate_metric(key, 1.0, 0, 0)
        _validate_param_name(key)
        _validate_tag_name(key)
    assert tracker_keys(keys.values()) == {key: key for key in keys.values()}


def test_a_condition_holds_any_quote():
    assert tag_condition("t", "a") == "tags.`t` = 'a'"
    assert tag_condition("t", "it's") == 'tags.`t` = "it\'s"'
    assert tag_condition("t", "'\"") == "tags.`t` LIKE '__'"
