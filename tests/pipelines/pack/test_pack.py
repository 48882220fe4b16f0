from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_tools

from pipelines.load.images import decode
from pipelines.pack import pack as pack_module
from pipelines.pack.pack import PackOptions, pack, pack_shard
from pipelines.shards.dataset import open_dataset
from tests.pipelines.tiny_coco import (
    box_annotation,
    noise_image,
    pack_folder,
    packed_coco,
    write_coco,
)

RLE = rle_tools.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))
TALLER = rle_tools.encode(np.asfortranarray(np.eye(31, 40, dtype=np.uint8)))
RLE_TEXT = {"size": [30, 40], "counts": RLE["counts"].decode()}

BAD_ANNOTATIONS = {
    "polygon has 2 points": {"segmentation": [[1, 1, 5, 5]]},
    "odd count": {"segmentation": [[1, 1, 5, 5, 7, 7, 8]]},
    "polygon has a coordinate that is not finite": {"segmentation": [[1, 1, 5, 5, 7, math.nan]]},
    "is not finite": {"bbox": [1, 1, math.inf, 5]},
    "is inverted": {"bbox": [20, 20, -10, 5]},
    "lies off its 40 x 30 image": {"bbox": [100, 100, 10, 10]},
    "bbox is None": {"bbox": None},
    "category_id 99 is not among the categories": {"category_id": 99},
    "image_id 99 is not among the images": {"image_id": 99},
    "RLE is empty (no pixel set)": {"segmentation": {"size": [30, 40], "counts": [1200]}},
    "RLE is empty;": {"segmentation": {"size": [30, 40], "counts": ""}},
    "do not add up to 1200 pixels": {"segmentation": {"size": [30, 40], "counts": [3, 4]}},
    "is not the image's [30, 40]": {
        "segmentation": {"size": [40, 30], "counts": RLE_TEXT["counts"]}
    },
    "RLE counts do not add up": {"segmentation": RLE_TEXT | {"counts": TALLER["counts"].decode()}},
    "RLE counts cannot be read": {"segmentation": {"size": [30, 40], "counts": "é!"}},
    "RLE size [30.0, 40.0] is not": {"segmentation": {"size": [30.0, 40.0], "counts": [0, 1200]}},
    "segmentation is neither": {"segmentation": {"counts": [0, 1200]}},
    "polygon is not a list of numbers": {"segmentation": [1, 1, 5, 5, [7, 7]]},
    "polygon lies off its 40 x 30 image": {"segmentation": [[100, 100, 120, 100, 120, 120]]},
    "image sides beyond the edge": {"segmentation": [[1, 1, 1e9, 1, 5, 9]]},
    "bbox is ['1', 1, 5, 5]": {"bbox": ["1", 1, 5, 5]},
    "bbox [1, 1, 1000": {"bbox": [1, 1, 10**400, 5]},
    "area is -1": {"area": -1},
    "iscrowd is None": {"iscrowd": None},
    "num_keypoints is '3.0'": {"num_keypoints": "3.0"},
    "image_id is 9223372036854775808": {"image_id": 2**63},
    "id -1 is below 0": {"id": -1},
    "has no integer id of 64 bits": {"id": 1.5},
    "area is None": {"area": None},
    "iscrowd is 2": {"iscrowd": 2},
    "its category names none": {"keypoints": [1, 2, 2]},
    "no integer id": {"id": "two"},
    "no integer id of 64": {"id": "two\nlines"},
    "no integer id of": {"id": 10**100},
}


@pytest.mark.parametrize("finding", BAD_ANNOTATIONS)
def test_a_bad_annotation_is_named_with_file_id_and_remedy(tmp_path, finding):
    bad = (
        box_annotation(2, **BAD_ANNOTATIONS[finding])
        if "id" not in BAD_ANNOTATIONS[finding]
        else None
    )
    bad = bad or (box_annotation(2) | BAD_ANNOTATIONS[finding])
    write_coco(tmp_path, [box_annotation(1), bad])
    with pytest.raises(ValueError, match=r"instances\.json") as caught:
        pack_folder(tmp_path)
    message = str(caught.value)
    shown = {"two\nlines": r"'two\nlines'", 10**100: f"1{'0' * 79}..."}
    expected_id = shown.get(bad["id"], bad["id"])
    assert f"annotation {expected_id}" in message
    assert "\n" not in message
    assert finding in message
    assert "--on-error skip" in message
    assert message.count("; ") >= 1, "the remedy follows the finding"
    packed = pack_folder(tmp_path, on_error="skip")
    assert packed.skipped == packed.manifest.num_skipped == 1
    assert packed.manifest.num_annotations == 1
    [skipped] = json.loads((tmp_path / "packed" / "skipped.json").read_text())
    assert skipped["id"] == expected_id
    assert finding.rstrip(";") in skipped["what"]


def bad_image(folder: Path, kind: str) -> str:
    """Spoils image 2 of a dataset; returns what the message must say."""
    file = folder / "images" / "2.jpg"
    match kind:
        case "missing":
            file.unlink()
            return "there is no such file"
        case "text":
            file.write_text("hello")
            return "cannot be read"
        case "truncated":
            file.write_bytes(file.read_bytes()[:-200])
            return "cannot be read"
        case "empty":
            file.write_bytes(b"")
            return "cannot be read"
        case "gif":
            noise_image().save(file, "GIF")
            return "neither JPEG nor PNG"
        case "half a PNG":
            noise_image().save(file, "PNG")
            file.write_bytes(file.read_bytes()[:-900])
            return "cannot be read"
        case "size":
            noise_image(40, 31).save(file)
            return "the file is 40 x 31, the JSON says 40 x 30"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "truncated", "empty", "gif", "half a PNG", "size"]
)
def test_a_bad_image_is_named_with_file_id_and_remedy(tmp_path, kind):
    write_coco(
        tmp_path, [box_annotation(1, 1), box_annotation(2, 2), box_annotation(3, 3)], num_images=3
    )
    expected = bad_image(tmp_path, kind)
    with pytest.raises(ValueError, match=r"2\.jpg: image 2: ") as caught:
        pack_folder(tmp_path)
    assert expected in str(caught.value)
    packed = pack_folder(tmp_path, on_error="skip")
    assert (packed.manifest.num_images, packed.manifest.num_annotations, packed.skipped) == (
        2,
        2,
        1,
    )


def test_ids_that_are_there_twice_are_named(tmp_path):
    image = {"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}
    noise_image().save((tmp_path / "images").mkdir() or tmp_path / "images" / "1.jpg")
    write_coco(
        tmp_path, [box_annotation(5), box_annotation(5, category_id=7)], images=[image, image]
    )
    packed = pack_folder(tmp_path, on_error="skip")
    assert (packed.manifest.num_images, packed.manifest.num_annotations, packed.skipped) == (
        1,
        1,
        2,
    )
    (tmp_path / "packed" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="image 1: its id is there twice"):
        pack_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["folder", "/etc/hosts", "../1.jpg", "a/../../1.jpg", "a\0b", "\ud800", "x" * 300, 7, ""],
)
def test_a_file_name_that_leads_nowhere_is_named(tmp_path, name):
    image = {"id": 1, "file_name": name, "width": 40, "height": 30}
    (tmp_path / "images" / "folder").mkdir(parents=True)
    write_coco(tmp_path, [], images=[image])
    with pytest.raises(ValueError, match=r"image 1: .*; .*--images.*, or leave it out"):
        pack_folder(tmp_path)


GOOD = {"images": [], "annotations": [], "categories": []}


@pytest.mark.parametrize(
    ("category", "finding"),
    [
        ({"id": "three", "name": "cat"}, "has no integer id"),
        ({"id": 2**70, "name": "cat"}, "has no integer id"),
        ({"id": 3}, "name is None"),
        ({"id": 3, "name": "cat", "keypoints": None}, "keypoints is None"),
        ([1], "has no integer id"),
    ],
)
def test_a_bad_category_is_named(tmp_path, category, finding):
    write_coco(tmp_path, [], categories=[category])
    with pytest.raises(ValueError, match=f"instances.json: category .*{finding}.*; "):
        pack_folder(tmp_path)
    write_coco(tmp_path, [], categories=[{"id": 3, "name": "cat"}] * 2)
    with pytest.raises(ValueError, match="category 3: its id is there twice"):
        pack_folder(tmp_path)


def test_what_is_odd_but_clear_is_packed(tmp_path):
    """A byte-order mark, no licenses, big and negative ids, names with folders, absent fields."""
    big, image = 2**53 + 1, {"id": -7, "file_name": "über/ein bild.png", "width": 40, "height": 30}
    (tmp_path / "images" / "über").mkdir(parents=True)
    noise_image().convert("P").save(tmp_path / "images" / image["file_name"], transparency=3)
    annotation = {
        "id": big,
        "image_id": -7,
        "category_id": 3,
        "bbox": [5, 5, 10, 10],
        "area": 0,
        "keypoints": [],
    }
    path = write_coco(tmp_path, [annotation], images=[image])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()[:-1] + b', "licenses": null, "info": [1]}')
    pack_folder(tmp_path)
    coco = open_dataset(str(tmp_path / "packed")).coco()
    assert coco["images"] == [image]
    assert [(a["id"], a["iscrowd"]) for a in coco["annotations"]] == [(big, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"info": ' + '{"a": ' * 20_000,
        '{"images": [{"id": ' + "9" * 5000 + "}]}",
        json.dumps(GOOD) + "{}",
        json.dumps(GOOD)[:-1],
        json.dumps(GOOD | {"annotations": None}),
        "",
        "hello",
        "[]",
        '{"images": []}',
        '[{"image_id": 1, "score": 1}]',
        '{"images": 3, "annotations": []',
        "\x00\x01",
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, text):
    write_coco(tmp_path)
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(ValueError, match=r"instances\.json: not COCO JSON"):
        pack_folder(tmp_path, on_error="skip")


def test_missing_inputs_and_empty_datasets_are_refused(tmp_path):
    write_coco(tmp_path, images=[])
    with pytest.raises(ValueError, match="no image"):
        pack_folder(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        pack_folder(tmp_path, tmp_path / "absent.json")
    with pytest.raises(ValueError, match="no such folder"):
        pack([tmp_path / "instances.json"], str(tmp_path / "absent"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is a file; give --out a folder"):
        pack(
            [tmp_path / "instances.json"],
            str(tmp_path / "images"),
            str(tmp_path / "instances.json"),
        )


def test_image_and_category_ids_from_0_are_kept(tmp_path):
    (tmp_path / "images").mkdir()
    noise_image().save(tmp_path / "images" / "0.jpg")
    images = [{"id": 0, "file_name": "0.jpg", "width": 40, "height": 30}]
    annotation = box_annotation(1, 0, category_id=0)
    dataset = packed_coco(
        tmp_path, [annotation], images=images, categories=[{"id": 0, "name": "zero"}]
    )
    assert dataset.category_ids == (0,)
    assert dataset.coco()["annotations"][0]["image_id"] == 0


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", mode) for mode in ("RGB", "L", "CMYK")]
    + [("png", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "I;16")],
)
def test_every_kind_of_image_is_decoded_as_pillow_does(tmp_path, suffix, mode):
    (tmp_path / "images").mkdir()
    if mode == "I;16":
        deep = np.random.default_rng(0).integers(0, 65536, (30, 40), np.uint16)
        picture = Image.fromarray(deep)
        expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)
    else:
        picture = noise_image().convert(mode)
        expected = None
    path = tmp_path / "images" / f"1.{suffix}"
    picture.save(path)
    if expected is None:
        expected = np.asarray(Image.open(path).convert("RGB"))
    images = [{"id": 1, "file_name": path.name, "width": 40, "height": 30}]
    dataset = packed_coco(tmp_path, [box_annotation(1)], images=images)
    row = dataset.row(0)
    np.testing.assert_array_equal(
        decode(row.content, row.orientation).permute(1, 2, 0).numpy(), expected
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_where_the_json_has_the_turned_size(tmp_path, orientation):
    from PIL import ImageOps

    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise_image().save(tmp_path / "images" / "1.png", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "images" / "1.png"))
    images = [{"id": 1, "file_name": "1.png", "width": turned.width, "height": turned.height}]
    dataset = packed_coco(tmp_path, [box_annotation(1)], images=images)
    row = dataset.row(0)
    np.testing.assert_array_equal(
        decode(row.content, row.orientation).permute(1, 2, 0).numpy(), np.asarray(turned)
    )


def test_exif_rotation_is_left_where_the_json_has_the_bare_size(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image().save(tmp_path / "images" / "1.png", exif=exif)
    images = [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}]
    row = packed_coco(tmp_path, [box_annotation(1)], images=images).row(0)
    expected = np.asarray(noise_image())
    np.testing.assert_array_equal(
        decode(row.content, row.orientation).permute(1, 2, 0).numpy(), expected
    )


def test_instances_and_keypoints_merge_by_annotation_id(tmp_path):
    names = ["nose", "left_eye", "right_eye"]
    plain = write_coco(tmp_path, [box_annotation(1), box_annotation(2, category_id=7)])
    person = [{"id": 3, "name": "cat", "keypoints": names, "skeleton": [[1, 2]]}]
    points = box_annotation(1, keypoints=[6, 6, 2, 7, 7, 1, 0, 0, 0], num_keypoints=2)
    more = write_coco(tmp_path, [points], categories=person, name="keypoints.json")
    pack_folder(tmp_path, plain, more)
    dataset = open_dataset(str(tmp_path / "packed"))
    first, second = dataset.coco()["annotations"]
    assert first["keypoints"] == [6, 6, 2, 7, 7, 1, 0, 0, 0]
    assert first["num_keypoints"] == 2
    assert first["segmentation"] == [[5, 5, 15, 5, 15, 15, 5, 15]]
    assert "keypoints" not in second
    assert dataset.manifest.num_keypoints == 3
    assert dataset.manifest.num_images == 1


def test_files_that_contradict_each_other_are_refused(tmp_path):
    plain = write_coco(tmp_path, [box_annotation(1)], num_images=2)
    other = write_coco(tmp_path, [box_annotation(1, image_id=2)], num_images=2, name="other.json")
    with pytest.raises(
        ValueError, match=r"other\.json: annotation 1: its image_id is 1 in another file and 2 here"
    ):
        pack_folder(tmp_path, plain, other)


def test_packing_again_changes_nothing(tmp_path):
    write_coco(tmp_path, [box_annotation(1)], num_images=3)
    assert not pack_folder(tmp_path).unchanged
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "packed").iterdir()
    }
    assert pack_folder(tmp_path).unchanged
    assert before == {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "packed").iterdir()
    }
    write_coco(tmp_path, [box_annotation(2)], num_images=3)
    with pytest.raises(ValueError, match="holds a dataset packed from other inputs"):
        pack_folder(tmp_path)


def test_an_interrupted_packing_goes_on_where_it_stopped(tmp_path, monkeypatch):
    write_coco(tmp_path, [box_annotation(n, n) for n in range(1, 7)], num_images=6)
    options = {"shard_mib": 0.001}
    whole = pack_folder(tmp_path, **options).manifest
    assert whole.num_shards > 2
    for path in (tmp_path / "packed").iterdir():
        path.unlink()
    started = []

    def interrupted(task):
        started.append(task.number)
        if len(started) > 2:
            raise KeyboardInterrupt
        return pack_shard(task)

    monkeypatch.setattr(pack_module, "pack_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(tmp_path, **options)
    assert not (tmp_path / "packed" / "manifest.json").exists()
    monkeypatch.undo()
    packed = pack_folder(tmp_path, **options)
    assert packed.resumed_shards == 2
    assert packed.manifest.hash == whole.hash
    assert not (tmp_path / "packed" / ".packing").exists()


def test_workers_write_the_same_bytes_and_the_same_first_error(tmp_path):
    write_coco(tmp_path, [box_annotation(n, n) for n in range(1, 7)], num_images=6)
    files = [tmp_path / "instances.json"]
    hashes = {
        pack(
            files,
            str(tmp_path / "images"),
            str(tmp_path / f"out-{n}"),
            PackOptions("fail", 0.003, n),
        ).manifest.hash
        for n in (1, 2)
    }
    assert len(hashes) == 1
    (tmp_path / "images" / "2.jpg").unlink()
    (tmp_path / "images" / "5.jpg").unlink()
    with pytest.raises(ValueError, match="image 2"):
        pack(files, str(tmp_path / "images"), str(tmp_path / "bad"), PackOptions("fail", 0.003, 2))


def test_a_dataset_without_any_annotation_packs(tmp_path):
    dataset = packed_coco(tmp_path, [], num_images=2)
    assert len(dataset.coco()["images"]) == 2
    assert dataset.coco()["annotations"] == []
    assert not dataset.manifest.has_masks
