"""What a message advises works: each remedy is tried as it is written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from contract.data import Filter
from pipelines.load.order import Order
from pipelines.shards.dataset import Dataset, open_dataset
from tests.pipelines.pack.test_remarks import image_record, remarks_of, written
from tests.pipelines.tiny_coco import (
    box_annotation,
    noise_image,
    pack_folder,
    packed_coco,
    rle_of,
    write_coco,
)


def follow(message: str, file: Path) -> None:
    """Runs the command that a message gives."""
    [command] = re.findall(r"sed -i .* FILE", message)
    subprocess.run(command.replace("FILE", shlex.quote(str(file))), shell=True, check=True)


@pytest.mark.parametrize("folder", ["plain", "with space", "it's [odd] #1.$"])
def test_absolute_names_in_several_folders_below_images(tmp_path, folder):
    root = tmp_path / folder
    for id, name in enumerate(("a/1.jpg", "b/2.jpg"), 1):
        written(root, noise_image(seed=id), name=name)
    records = [
        image_record(id, file_name=f"{root}/images/{name}")
        for id, name in enumerate(("a/1.jpg", "b/2.jpg"), 1)
    ]
    path = write_coco(root, [box_annotation(1)], images=records)
    with pytest.raises(ValueError, match="is an absolute path") as caught:
        pack_folder(root)
    follow(str(caught.value), path)
    assert pack_folder(root).manifest.num_images == 2


def test_absolute_names_of_another_machine(tmp_path):
    written(tmp_path, noise_image())
    written(tmp_path, noise_image(), name="2.jpg")
    records = [image_record(id, file_name=f"/home/else/{id}.jpg") for id in (1, 2)]
    path = write_coco(tmp_path, [box_annotation(1)], images=records)
    with pytest.raises(ValueError, match="is an absolute path") as caught:
        pack_folder(tmp_path)
    follow(str(caught.value), path)
    assert pack_folder(tmp_path).manifest.num_images == 2


# --- keypoints without names ----------------------------------------------------------------------


def test_keypoints_on_a_category_without_names(tmp_path):
    """Both remedies: names for the category, or no keypoints."""
    points = [7, 7, 2, 9, 9, 1]
    first = write_coco(tmp_path / "a", [box_annotation(1, keypoints=points, num_keypoints=2)])
    with pytest.raises(
        ValueError, match=r'write 2 names into the category .* or delete "keypoints"'
    ):
        pack_folder(tmp_path / "a")
    coco = json.loads(first.read_text())
    coco["categories"][0]["keypoints"] = ["nose", "tail"]
    first.write_text(json.dumps(coco))
    assert pack_folder(tmp_path / "a").manifest.has_keypoints
    write_coco(tmp_path / "b", [box_annotation(1, num_keypoints=2)])
    assert not pack_folder(tmp_path / "b").manifest.has_keypoints


# --- nothing trains -------------------------------------------------------------------------------


def order_of(dataset: Dataset, **chosen: Any) -> Order:
    view = dataset.for_training(Filter(**chosen))
    return Order(
        view.index, view.selection, seed=0, global_batch=1, window_shards=1, block_batches=1
    )


def test_a_file_of_crowds_alone(tmp_path):
    """A habit of mask exports: each object is an RLE, and so iscrowd is 1."""
    mask = rle_of(box_annotation(1)["segmentation"], 30, 40)
    mask["counts"] = mask["counts"].decode()
    crowds = [box_annotation(id, iscrowd=1, segmentation=mask) for id in (1, 2)]
    path = write_coco(tmp_path, crowds)
    packed = pack_folder(tmp_path)
    assert remarks_of(packed) == {"all_crowds": 2}
    assert "2 annotations, all with iscrowd 1: nothing trains" in str(packed.remarks[0])
    message = r"usable object \(0 of 2 objects train: 2 crowds\); iscrowd 1 marks a region"
    with pytest.raises(ValueError, match=message) as caught:
        order_of(open_dataset(str(tmp_path / "packed")))
    follow(str(caught.value), path)
    (tmp_path / "packed").rename(tmp_path / "old")
    assert remarks_of(pack_folder(tmp_path)) == {}
    assert order_of(open_dataset(str(tmp_path / "packed"))).num_images == 1


@pytest.mark.parametrize(
    ("fields", "chosen", "line", "remedy"),
    [
        ({}, {"min_area_px": 1000}, "1 below min_area_px", "widen data.filter"),
        ({}, {"require_keypoints": True}, "1 in images without keypoints", "widen data.filter"),
        ({}, {"categories": ("dog",)}, "0 of 0 objects train", "pack annotations of these"),
        ({"bbox": [5, 5, 0, 3]}, {}, "1 without a box", "boxes with a width and a height"),
    ],
)  # fmt: skip
def test_why_nothing_trains(tmp_path, fields, chosen, line, remedy):
    dataset = packed_coco(tmp_path, [box_annotation(1, **fields)])
    with pytest.raises(ValueError, match=f"{line}.*; .*{remedy}"):
        order_of(dataset, **chosen)


# --- a category that heads the others -------------------------------------------------------------

HEADED = [
    {"id": 0, "name": "fish", "supercategory": "none"},
    {"id": 1, "name": "cod", "supercategory": "fish"},
    {"id": 2, "name": "bass, black", "supercategory": "fish"},
]


def test_a_category_that_only_heads_others_is_told(tmp_path):
    write_coco(tmp_path, [box_annotation(1, category_id=1)], categories=HEADED)
    [remark] = pack_folder(tmp_path).remarks
    assert str(remark).startswith("1 category without objects that only head")
    assert "(category 0: 'fish')" in str(remark)


def test_a_category_with_objects_of_its_own_is_no_heading(tmp_path):
    annotations = [box_annotation(id, category_id=id) for id in (0, 1)]
    write_coco(tmp_path, annotations, categories=HEADED)
    assert remarks_of(pack_folder(tmp_path)) == {"id_zero": 1}


# --- one meaning only -----------------------------------------------------------------------------


def test_what_via_writes_is_read_and_counted(tmp_path):
    """Ids as text, and one polygon in the place of a list of polygons."""
    bare = [5, 5, 15, 5, 15, 15, 5, 15]
    write_coco(tmp_path, [box_annotation(1, image_id="1", category_id="3", segmentation=bare)])
    packed = pack_folder(tmp_path)
    assert remarks_of(packed) == {"text_number": 1, "bare_polygon": 1}
    [annotation] = open_dataset(str(tmp_path / "packed")).coco()["annotations"]
    assert (annotation["image_id"], annotation["category_id"]) == (1, 3)
    assert annotation["segmentation"] == [bare]


@pytest.mark.parametrize("id", ["01", "1.0", " 1", "one", "", "1e3", "١", "9" * 30])
def test_text_of_more_than_one_meaning_is_no_id(tmp_path, id):
    write_coco(tmp_path, [box_annotation(1, image_id=id)])
    with pytest.raises(ValueError, match="give it the whole number of its image"):
        pack_folder(tmp_path)


def test_the_id_of_a_category_is_a_number_everywhere(tmp_path):
    categories = [{"id": "3", "name": "cat"}, {"id": 7.0, "name": "dog"}]
    write_coco(tmp_path, [box_annotation(1, category_id="3")], categories=categories)
    packed = pack_folder(tmp_path)
    assert remarks_of(packed) == {"whole_float": 1, "text_number": 2}
    back = open_dataset(str(tmp_path / "packed")).coco()
    assert [str(category["id"]) for category in back["categories"]] == ["3", "7"]
    assert back["annotations"][0]["category_id"] == 3
