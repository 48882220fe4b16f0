"""What a person can get wrong, or a disk: one line that names it, and the right exit code."""

from __future__ import annotations

import json
import math
import shutil
import struct
import warnings
import zlib
from typing import Any

import pytest

from contract.command import run_app
from contract.files import Files
from pipelines.__main__ import app
from pipelines.coco.decoding import Stored, TooLargeError, decode_pixels, read_header
from pipelines.evaluate.evaluation import evaluate
from pipelines.inspect.verify import verify
from pipelines.shards.dataset import open_dataset
from pipelines.shards.mapping import MappedFile
from tests.pipelines.tiny_coco import (
    CATEGORIES,
    box_annotation,
    pack_folder,
    packed_coco,
    write_coco,
)


@pytest.fixture
def call(capsys):
    def run(*words: Any) -> tuple[int, str]:
        """The exit status and the line on stderr, which must be the only one."""
        status = run_app(app, [str(word) for word in words], "maskray")
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (status != 0), captured.err
        assert len(captured.err) < 1000
        return status, captured.err

    return run


# --- evaluation -----------------------------------------------------------------------------------


BAD_POLYGONS = [
    ([1, 2, 3, math.nan, 3, 3], "polygon has a coordinate that is not finite"),
    ([1, 2, 3, math.inf, 3, 3], "polygon has a coordinate that is not finite"),
    ([1, 2, 3, 10**400, 3, 3], "polygon has a coordinate that is not finite"),
    ([1, 2, 3, 1e9, 3, 3], "polygon reaches 33333332 image sides beyond the edge"),
    ([1, 2, 3, 4], "give polygons of 3 or more points"),
    ([1, 2, 3, 4, 5, 6, 7], "give polygons of 3 or more points"),
    ([1, 2, "3", 4, 5, 6], "give polygons of 3 or more points"),
    ("123456", "give polygons of 3 or more points"),
]


@pytest.mark.parametrize(("polygon", "message"), BAD_POLYGONS)
def test_a_polygon_that_would_fill_the_memory_is_refused(call, tmp_path, polygon, message):
    path = write_coco(tmp_path, [box_annotation(1)])
    good = {"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": [[1, 2, 9, 2, 3, 9]]}
    (tmp_path / "dt.json").write_text(json.dumps([good, good | {"segmentation": [polygon]}]))
    status, line = call("eval", "--gt", path, "--dt", tmp_path / "dt.json", "--iou", "segm")
    assert (status, "result 1: " in line, message in line) == (2, True, True), line
    path = write_coco(tmp_path, [box_annotation(5, segmentation=[polygon])])
    (tmp_path / "dt.json").write_text("[]")
    status, line = call("eval", "--gt", path, "--dt", tmp_path / "dt.json", "--iou", "segm")
    assert (status, "annotation 5: " in line, message in line) == (2, True, True), line


def test_a_polygon_off_the_image_is_an_empty_mask(tmp_path):
    path = write_coco(tmp_path, [box_annotation(1)])
    result = {
        "image_id": 1,
        "category_id": 3,
        "score": 0.5,
        "segmentation": [[50, 2, 60, 2, 55, 9]],
    }
    assert evaluate(path, [result], "segm").stats["AP"] == 0


@pytest.mark.parametrize("sides", [(1 << 21, 4), (1 << 16, 1 << 16)])
def test_an_image_too_large_for_masks_is_refused(tmp_path, sides):
    image = {"id": 1, "file_name": "1.jpg", "width": sides[0], "height": sides[1]}
    path = write_coco(tmp_path, [box_annotation(1)], images=[image])
    with pytest.raises(
        ValueError, match=r"image 1 of the ground truth has height and width .*fit in memory"
    ):
        evaluate(path, [], "segm")


@pytest.mark.parametrize(
    ("annotation", "fields", "message"),
    [
        (
            {},
            {"categories": [{"id": 3, "name": [1]}]},
            "category 3: name is .1.; write its name as text",
        ),
        ({}, {"categories": [*CATEGORIES, CATEGORIES[0]]}, r"categories\[2\]: id 3 is there twice"),
        ({}, {"images": [{"id": 1}, {"id": 1}]}, r"images\[1\]: id 1 is there twice"),
        (
            {},
            {"images": [{"id": 1}, {"id": 10**400}]},
            r"images\[1\]: id is 10*\.\.\.; write a whole number of 64",
        ),
    ],
)
def test_ground_truth_that_contradicts_itself_is_refused(tmp_path, annotation, fields, message):
    path = write_coco(tmp_path, [box_annotation(1, **annotation)], **fields)
    with pytest.raises(ValueError, match=f"instances.json: {message}") as caught:
        evaluate(path, [], "bbox")
    assert len(str(caught.value).removeprefix(str(path))) < 200


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_annotations_of_what_is_not_listed_count_nowhere(tmp_path, kind):
    detection = {"image_id": 1, "category_id": 3, "score": 0.9} | {
        "bbox": {"bbox": [5, 5, 10, 10]},
        "segm": {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]},
    }[kind]
    more = [box_annotation(2, image_id=9), box_annotation(3, category_id=9)]
    path = write_coco(tmp_path, [box_annotation(1), *more])
    assert evaluate(path, [detection], kind).stats["AP"] == pytest.approx(1.0)


def test_a_score_of_400_digits_is_told_in_short(call, tmp_path):
    path = write_coco(tmp_path, [box_annotation(1)])
    result = {"image_id": 1, "category_id": 3, "score": 10**400, "bbox": [1, 2, 3, 4]}
    (tmp_path / "dt.json").write_text(json.dumps([result]))
    status, line = call("eval", "--gt", path, "--dt", tmp_path / "dt.json")
    assert (status, "score is 1000" in line, len(line) < 150) == (2, True, True)


def test_two_categories_of_one_name_are_both_told(tmp_path):
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    annotations = [box_annotation(1), box_annotation(2, category_id=7)]
    detections = [{"image_id": 1, "category_id": 7, "score": 0.5, "bbox": [5, 5, 10, 10]}]
    expected = {"cat (id 3)": 0, "cat (id 7)": pytest.approx(1), "dog": -1}
    dataset = packed_coco(tmp_path, annotations, categories=categories)
    assert evaluate(dataset, detections, "bbox").per_class["AP"] == expected
    (tmp_path / "exported.json").write_text(
        json.dumps(open_dataset(str(tmp_path / "packed")).coco())
    )
    assert evaluate(tmp_path / "exported.json", detections, "bbox").per_class["AP"] == expected


# --- commands -------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_drawn_is_a_persons_error(call, shapes, tmp_path):
    (tmp_path / "file").write_text("x")
    show = ("data", "show", shapes / "val", "--out")
    status, line = call(*show, tmp_path)
    assert (status, f"{tmp_path}: is a folder; give --out a file" in line) == (2, True)
    status, line = call(*show, tmp_path / "file" / "deep" / "look.png")
    assert (status, f"{tmp_path / 'file'} is a file; give --out a path below folders" in line) == (
        2,
        True,
    )
    for seed in (10**40, 2**63, -(2**63) - 1):
        status, line = call(*show, tmp_path / "look.png", "--seed", seed)
        assert (status, "give a whole number of 64 bits" in line) == (2, True)
    assert not (tmp_path / "look.png").exists()
    assert call(*show, tmp_path / "look.png", "--seed", -(2**63))[0] == 0


@pytest.mark.parametrize("size", [31, 10_000_000, 10**40])
def test_a_size_that_cannot_be_drawn_is_refused(call, tmp_path, size):
    status, line = call("data", "synth", tmp_path / "new", "--size", size)
    assert (status, "give 32 to 4096 px" in line, (tmp_path / "new").exists()) == (2, True, False)


# --- stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://", "s3://: names no bucket; write s3://BUCKET/PATH"),
        ("s3:///train", "s3:///train: names no bucket; write s3://BUCKET/PATH"),
        ("s3://?region=x", "names no bucket"),
        ("gs://anonymous@/x", "names no bucket; write gs://BUCKET/PATH"),
        ("abfs://c@a/x", "'abfs' is none of s3, gs, gcs, file"),
        ("hdfs://host/x", "'hdfs' is none of s3, gs, gcs, file"),
        ("s3://me:secret@/x", "s3://***@/x: names no bucket"),
        (
            "s3://me:sec/ret@bucket/x?frobnicate=1",
            "s3://***@bucket/x?frobnicate=1: not a URI that pyarrow.fs opens",
        ),
        ("ftp://me:secret@host/x", "ftp://***@host/x: not a URI"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_named_without_its_password(call, uri, message):
    for command in ("verify", "show"):
        status, line = call("data", command, uri)
        assert (status, message in line, "sec" in line) == (2, True, False), line


def test_a_store_is_described_without_its_password():
    assert Files("s3://me:secret@bucket/train?region=x").describe("a") == "s3://***@bucket/train/a"
    assert Files("gs://anonymous@bucket/train").describe("a") == "gs://anonymous@bucket/train/a"
    assert Files("/data/a:b@c").describe("a") == "/data/a:b@c/a"


# --- a packed dataset that was damaged ------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.arrow", "shard-00000.arrow"])
@pytest.mark.parametrize("kept", [0, 64])
def test_a_zeroed_file_is_named(call, shapes, tmp_path, name, kept):
    copy = shutil.copytree(shapes / "val", tmp_path / "copy")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:kept] + bytes(len(content) - kept))
    (tmp_path / "dt.json").write_text("[]")
    for words in (
        ("data", "show", copy, "--out", tmp_path / "look.png"),
        ("data", "export", copy, "--out", tmp_path / "back.json"),
        ("eval", "--gt", copy, "--dt", tmp_path / "dt.json"),
    ):
        status, line = call(*words)
        assert (status, f"{copy / name}: is damaged" in line, "pack the data again" in line) == (
            1,
            True,
            True,
        ), line
    assert [damage.shard for damage in verify(str(copy)).errors] == [name]


def test_an_arrow_file_that_ends_early_within_is_named(shapes, tmp_path):
    """The footer is whole, the record batches are not."""
    content = (shapes / "val" / "shard-00000.arrow").read_bytes()
    (tmp_path / "shard").write_bytes(
        content[:8] + bytes(len(content) // 2 - 8) + content[len(content) // 2 :]
    )
    with pytest.raises(RuntimeError, match="shard: is damaged"):
        MappedFile(tmp_path / "shard")
    with pytest.raises(RuntimeError, match="is a folder; restore it"):
        MappedFile(tmp_path)


def test_a_manifest_that_is_none_is_named(call, shapes, tmp_path):
    copy = shutil.copytree(shapes / "val", tmp_path / "copy")
    manifest = copy / "manifest.json"
    manifest.write_text("[" * 100_000)
    status, line = call("data", "show", copy)
    assert (status, f"{manifest}: not a readable manifest" in line) == (1, True), line
    manifest.unlink()
    manifest.mkdir()
    status, line = call("data", "show", copy)
    assert (status, f"{manifest}: is a folder; restore the file" in line) == (1, True), line


# --- images ---------------------------------------------------------------------------------------


def large_png(width: int, height: int) -> bytes:
    """A whole grey PNG whose pixels are all 0."""
    packer, pieces = zlib.compressobj(1), [b"\x89PNG\r\n\x1a\n"]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    pieces.append(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)))
    row = bytes(1 + -(-width // 8))
    pieces.append(
        chunk(b"IDAT", b"".join(packer.compress(row) for _ in range(height)) + packer.flush())
    )
    return b"".join([*pieces, chunk(b"IEND", b"")])


def test_an_image_that_is_too_large_is_told_so():
    content = large_png(14_000, 14_000)
    message = "14000 x 14000 pixels, more than the 180 megapixels allowed"
    with pytest.raises(TooLargeError, match=message):
        read_header(content)
    with pytest.raises(TooLargeError, match=message):
        decode_pixels(content)
    header = bytes.fromhex(
        "ffd8ffc0001108 36b0 36b0 03011100021100031100 ffda000c03010002000300003f00 00 ffd9"
    )
    with pytest.raises(TooLargeError, match=message):
        decode_pixels(header)


def test_a_large_image_below_the_bound_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header(large_png(10_000, 12_000)) == Stored((10_000, 12_000), 1)


def test_an_export_needs_a_file_to_write(tmp_path, capsys):
    packed_coco(tmp_path, [box_annotation(1)])
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file/x.json"):
        assert (
            run_app(app, ["data", "export", str(tmp_path / "packed"), "--out", str(out)], "maskray")
            == 2
        )
        assert "give --out a" in capsys.readouterr().err


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        (
            {},
            [{"bbox": [5, 5, 11, 10]}],
            r"k.json: annotation 1: its bbox is \[5, 5, 10, 10\] in another file and",
        ),
        (
            {},
            [{"bbox": "junk"}],
            r"annotation 1: its bbox is \[5, 5, 10, 10\] in another file and 'junk' here",
        ),
        (
            {},
            [{"area": 99}],
            "annotation 1: its area is 100 in another file and 99 here; merge only files of the "
            "same",
        ),
        ({}, [{"image_id": 2}], "annotation 1: its image_id is 1 in another file and 2 here"),
        ({}, [{}, {}], "annotation 1: its id is there twice"),
        (
            {"width": 41},
            [{}],
            "k.json: image 1: its width is 40 in another file and 41 here; merge only files of the",
        ),
        (
            {"file_name": "b.jpg"},
            [{}],
            "image 1: its file_name is '1.jpg' in another file and 'b.jpg' here",
        ),
        ({"again": True}, [{}], "k.json: image 1: its id is there twice"),
    ],
)
def test_files_that_contradict_each_other_are_not_merged(tmp_path, images, annotations, message):
    first = write_coco(tmp_path, [box_annotation(1)], num_images=2)
    coco = json.loads(first.read_text())
    again = [coco["images"][0]] if images.pop("again", False) else []
    coco["images"] = [coco["images"][0] | images, coco["images"][1], *again]
    coco["annotations"] = [
        box_annotation(1) | {"num_keypoints": 0} | changes for changes in annotations
    ]
    second = tmp_path / "k.json"
    second.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=message):
        pack_folder(tmp_path, first, second)
