from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipelines.coco import reading as coco_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    lists=st.fixed_dictionaries(
        {key: st.lists(VALUES, max_size=4) for key in ("images", "annotations", "categories")}
    ),
    others=st.dictionaries(
        st.text().filter(lambda key: key not in coco_json._LISTS), VALUES, max_size=3
    ),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
)
def test_any_json_is_read_the_same_at_any_chunk_size(lists, others, chunk, indent):
    whole = {**others, **lists}
    saved, coco_json.CHUNK_CHARS = coco_json.CHUNK_CHARS, chunk
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.json"
            path.write_text(json.dumps(whole, indent=indent))
            elements = list(coco_json.read_coco(path))
    finally:
        coco_json.CHUNK_CHARS = saved
    for key, values in lists.items():
        assert [value for name, value, text in elements if name == key and text] == values
    assert {name: value for name, value, _ in elements if name in others} == others
    assert all(json.loads(text) == value for _, value, text in elements if text)
