from __future__ import annotations

import colorsys
import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as rle_tools

from pipelines.coco.records import JsonObject
from pipelines.pack.scenes import CATEGORIES, GRID_PX
from pipelines.pack.synth import synthesise
from tests.pipelines.tiny_coco import rle_of

RECORDED = "7d32b1b3d4fcd8f53a04f4424bbf842febf7dc6a2ad5cb4e7f43d1a2284b8d8d"


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


def objects(folder: Path, split: str) -> list[JsonObject]:
    coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    assert [category["name"] for category in coco["categories"]] == list(CATEGORIES)
    assert [k for k, c in enumerate(coco["categories"]) if "keypoints" in c] == [0]
    return [annotation for annotation in coco["annotations"] if not annotation["iscrowd"]]


def test_scenes_are_drawn_without_a_look_at_the_class(tmp_path):
    synthesise(tmp_path, num_images=100, size=96, seed=4, kind="scenes", num_test=20)
    assert json.loads((tmp_path / "synth.json").read_text())["test"] == 20
    train, test = objects(tmp_path, "train"), objects(tmp_path, "test")
    assert {annotation["category_id"] for annotation in train} == set(range(1, 13))
    assert len({a["image_id"] for a in test}) == len(list((tmp_path / "images/test").iterdir()))
    assert min(a["image_id"] for a in test) > max(a["image_id"] for a in train)
    hues: list[tuple[float, int]] = []
    for annotation in train:
        path = tmp_path / "images" / "train" / f"{annotation['image_id']:07d}.jpg"
        pixels = np.asarray(PIL.Image.open(path))
        mask = rle_tools.decode(rle_of(annotation["segmentation"], *pixels.shape[:2])).astype(bool)
        hue = colorsys.rgb_to_hsv(*pixels[mask].mean(0) / 255)[0]
        hues.append((hue, annotation["category_id"]))
    hues.sort()
    # The neighbour by hue has the same class no more often than any two objects have.
    same = np.mean([a[1] == b[1] for a, b in pairwise(hues)])
    chance = sum(n * n for n in Counter(c for _, c in hues).values()) / len(hues) ** 2
    assert abs(same - chance) < 3 * (chance * (1 - chance) / len(hues)) ** 0.5
    persons = [annotation for annotation in train if "keypoints" in annotation]
    assert {annotation["category_id"] for annotation in persons} == {1}


def test_boxes_of_a_grid_lie_on_the_grid(tmp_path):
    synthesise(tmp_path, num_images=60, size=128, seed=0, kind="grid")
    boxes = np.array([annotation["bbox"] for annotation in objects(tmp_path, "train")])
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    # of hidden objects, too; COCO has two decimals
    np.testing.assert_allclose(edges, GRID_PX * np.round(edges / GRID_PX), rtol=0, atol=0.011)


def test_the_kinds_are_told_apart(tmp_path):
    synthesise(tmp_path, num_images=5, size=48, seed=1, kind="scenes")
    with pytest.raises(ValueError, match="holds another synthetic dataset"):
        synthesise(tmp_path, num_images=5, size=48, seed=1, kind="grid")
    with pytest.raises(ValueError, match="always has persons"):
        synthesise(tmp_path / "b", num_images=5, size=48, seed=1, kind="grid", keypoints=True)
    with pytest.raises(ValueError, match="--test is -1"):
        synthesise(tmp_path / "b", num_images=5, size=48, seed=1, num_test=-1)


def test_the_demo_keeps_its_bytes(tmp_path):
    """Recorded before scenes came: `make demo` prints a table that README.md shows."""
    synthesise(tmp_path, num_images=5, size=64, seed=0)
    annotations = (tmp_path / "annotations" / "instances_train.json").read_bytes()
    assert hashlib.sha256(annotations).hexdigest() == RECORDED
    assert "kind" not in (tmp_path / "synth.json").read_text()
