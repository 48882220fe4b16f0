from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pycocotools import mask as rle_tools

from pipelines.pack.synth import synthesise
from tests.pipelines.tiny_coco import rle_of


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(path.name.encode() + path.read_bytes() for path in files)
    ).hexdigest()


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert not synthesise(tmp_path / name, num_images=5, size=48, seed=seed).unchanged
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]
    assert synthesise(tmp_path / "a", num_images=5, size=48, seed=1).unchanged
    with pytest.raises(ValueError, match="holds another synthetic dataset"):
        synthesise(tmp_path / "a", num_images=6, size=48, seed=1)


def test_it_is_what_it_says(shapes):
    for split, count in (("train", 40), ("val", 10)):
        coco = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        assert len(coco["images"]) == count == len(list((shapes / "images" / split).iterdir()))
        assert [c["name"] for c in coco["categories"]] == ["person", "ellipse", "cross", "triangle"]
        assert len(coco["annotations"]) > 2 * count
        sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
        assert max(max(size) for size in sizes.values()) == 64
        for annotation in coco["annotations"]:
            rle = rle_of(annotation["segmentation"], *sizes[annotation["image_id"]])
            assert rle_tools.area(rle) == annotation["area"] >= 10
            mask_x, mask_y, mask_w, mask_h = rle_tools.toBbox(rle)
            x, y, w, h = annotation["bbox"]  # a thin tip may cover no pixel
            assert (
                min(mask_x - x, mask_y - y, x + w - mask_x - mask_w, y + h - mask_y - mask_h) >= -1
            )
            assert mask_w * mask_h >= 0.6 * w * h
            assert ("keypoints" in annotation) == (annotation["category_id"] == 1)
        persons = json.loads(
            (shapes / "annotations" / f"person_keypoints_{split}.json").read_text()
        )
        assert {a["category_id"] for a in persons["annotations"]} == {1}


def test_there_are_overlaps_crowds_and_hidden_keypoints(tmp_path):
    synthesise(tmp_path, num_images=80, size=64, seed=0, keypoints=True)
    annotations = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())[
        "annotations"
    ]
    assert any(a["iscrowd"] for a in annotations)
    assert sum(isinstance(a["segmentation"], dict) for a in annotations) > 5, (
        "partly hidden objects"
    )
    visibilities = [v for a in annotations for v in a.get("keypoints", [])[2::3]]
    assert {0, 1, 2} == set(visibilities)


@pytest.mark.parametrize(
    ("images", "size", "message"), [(1, 64, "--images is 1"), (5, 8, "--size is 8")]
)
def test_what_cannot_be_drawn_is_refused(tmp_path, images, size, message):
    with pytest.raises(ValueError, match=message):
        synthesise(tmp_path, num_images=images, size=size, seed=0)
