from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.inspect.verify import verify
from pipelines.shards.dataset import open_dataset


@pytest.fixture
def copy(shapes, tmp_path) -> Path:
    return Path(shutil.copytree(shapes / "train", tmp_path / "copy"))


def test_a_whole_dataset_has_no_errors(shapes):
    verdict = verify(str(shapes / "train"))
    assert (verdict.errors, verdict.samples) == ((), 40)
    assert verdict.shards == open_dataset(str(shapes / "train")).manifest.num_shards >= 8


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choice=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(copy, choice):
    name = choice.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    path = copy / name
    content = path.read_bytes()
    place = choice.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= 1 << choice.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        assert [damage.shard for damage in verify(str(copy)).errors] == [name]
    finally:
        path.write_bytes(content)


def test_a_flipped_byte_within_an_image_names_its_row(copy):
    dataset = open_dataset(str(copy))
    content = bytes(dataset.shard(2).content(1))
    path = copy / "shard-00002.arrow"
    whole = path.read_bytes()
    place = whole.index(content) + len(content) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    [damage] = verify(str(copy)).errors
    assert (damage.shard, damage.row) == ("shard-00002.arrow", 1)
    assert "sha256" in damage.error


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_truncated_shard_is_named_and_not_opened(copy, kept):
    path = copy / "shard-00003.arrow"
    path.write_bytes(path.read_bytes()[:kept])
    [damage] = verify(str(copy)).errors
    assert damage.shard == path.name
    assert "bytes, the manifest says" in damage.error
    with pytest.raises(RuntimeError, match=r"shard-00003\.arrow: has \d+ bytes"):
        open_dataset(str(copy)).shard(3)


def test_missing_shards_are_each_named(copy):
    for number in (1, 4):
        (copy / f"shard-0000{number}.arrow").unlink()
    verdict = verify(str(copy))
    assert [damage.shard for damage in verdict.errors] == ["shard-00001.arrow", "shard-00004.arrow"]
    assert all("missing" in damage.error for damage in verdict.errors)


def test_a_folder_without_a_manifest_is_a_persons_error(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json there; pack the data first"):
        verify(str(tmp_path))


def test_a_manifest_of_another_schema_asks_for_packing_again(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ValueError, match="schema 99"):
        open_dataset(str(copy))
