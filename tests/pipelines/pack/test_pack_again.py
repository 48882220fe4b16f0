"""Packing the same inputs again changes nothing, unless a file is damaged or an image mended."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable

import pytest

from pipelines.inspect.verify import verify
from pipelines.pack import pack as packing
from pipelines.pack import scratch
from pipelines.pack.pack import Packed, PackOptions, pack
from pipelines.pack.scratch import scratch_folder


@pytest.fixture
def again(shapes, tmp_path) -> Callable[..., Packed]:
    """Packs a copy of the validation set into the same folder, however often."""
    shutil.copytree(shapes / "images/val", tmp_path / "images")
    annotations = [shapes / "annotations/instances_val.json"]

    def run(on_error: str = "fail") -> Packed:
        options = PackOptions(on_error=on_error, shard_mib=0.008)  # type: ignore[arg-type]
        return pack(annotations, str(tmp_path / "images"), str(tmp_path / "out"), options)

    return run


@pytest.mark.parametrize("name", ["shard-00000.arrow", "index.arrow", "manifest.json"])
def test_damage_that_keeps_the_size_is_packed_anew(again, tmp_path, name):
    whole = again().manifest.hash
    assert again().unchanged
    file = tmp_path / "out" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    packed = again()
    assert (packed.unchanged, packed.manifest.hash) == (False, whole)
    assert verify(str(tmp_path / "out")).errors == ()
    assert again().unchanged


def test_an_image_that_was_left_out_is_taken_once_it_is_mended(again, tmp_path):
    image = sorted((tmp_path / "images").iterdir())[0]
    content = image.read_bytes()
    image.write_bytes(bytes(8) + content[8:])  # as large as before
    assert again("skip").skipped == 1
    assert again("skip").unchanged
    image.write_bytes(content)
    packed = again("skip")
    assert (packed.unchanged, packed.skipped, packed.manifest.num_images) == (False, 0, 10)


def test_a_dataset_of_no_image_is_none(again, tmp_path):
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image could be packed; the first: .*cannot be read"):
        again("skip")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    "damage", ["empty-note", "torn-note", "empty-index", "no-index", "damaged-shard"]
)
def test_an_interrupted_packing_goes_on_past_what_a_crash_cut_short(
    again, tmp_path, monkeypatch, damage
):
    whole = again().manifest.hash
    shutil.rmtree(tmp_path / "out")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(packing, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again()
    [note] = (tmp_path / "out/.packing").glob("*/shard-00000.arrow.json")
    index = note.with_suffix(".index")
    match damage:
        case "empty-note":
            note.write_text("")
        case "torn-note":
            note.write_text(json.dumps({"entry": {}}))
        case "empty-index":
            index.write_bytes(b"")
        case "no-index":
            index.unlink()
        case _:
            shard = tmp_path / "out/shard-00000.arrow"
            shard.write_bytes(bytes(shard.stat().st_size))
    packed = again()
    assert packed.manifest.hash == whole
    assert packed.resumed_shards == packed.manifest.num_shards - 1 > 0


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN"])
def test_what_the_manifest_cannot_keep_is_refused_before_any_work(shapes, tmp_path, value):
    coco = json.loads((shapes / "annotations/instances_val.json").read_text())
    text = json.dumps(coco | {"info": {"x": "HERE"}}).replace('"HERE"', value)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: info holds what JSON cannot keep"):
        pack(
            [tmp_path / "a.json"],
            str(shapes / "images/val"),
            str(tmp_path / "out"),
            PackOptions(on_error="skip"),
        )
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_in_the_temporary_folder_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    left, young = tmp_path / "x-left", tmp_path / "x-young"
    for folder in (left, young):
        folder.mkdir()
        (folder / ".lock").touch()
    monkeypatch.setattr(scratch, "_YOUNG_S", 5.0)
    old = time.time() - 100
    os.utime(left / ".lock", (old, old))
    with scratch_folder("x-") as first:
        os.utime(first / ".lock", (old, old))
        with scratch_folder("x-") as second:
            assert sorted(tmp_path.iterdir()) == sorted([young, first, second])
