from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract.data import Filter
from pipelines.inspect.verify import verify
from pipelines.pack import join as join_module
from pipelines.pack.join import join
from pipelines.pack.pack import PackOptions, pack
from pipelines.shards.dataset import open_dataset
from tests.pipelines.tiny_coco import box_annotation, noise_image, pack_folder, write_coco

PERSON = {"id": 1, "name": "person", "keypoints": ["nose", "tail"], "skeleton": []}


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A dataset of two images and one of three, with equal ids, other order, other category ids."""
    first = [box_annotation(1), box_annotation(40, 2, category_id=7)]
    second = [box_annotation(1, 3), box_annotation(2, 1, category_id=9)]
    return [
        packed(tmp_path / "first", first, num_images=2),
        packed(
            tmp_path / "second",
            second,
            num_images=3,
            seed=50,
            categories=[{"id": 3, "name": "dog"}, {"id": 9, "name": "cat"}],
        ),
    ]


def packed(
    folder: Path,
    annotations: Sequence[Mapping[str, Any]],
    *,
    num_images: int = 1,
    seed: int = 0,
    shard_mib: float = 0.001,
    **coco: Any,
) -> str:
    """A packed dataset of noise, an image to a shard."""
    folder.mkdir()
    write_coco(folder, annotations, num_images=num_images, **coco)
    for number in range(num_images):
        noise_image(seed=seed + number).save(folder / "images" / f"{number + 1}.jpg")
    pack_folder(folder, shard_mib=shard_mib)
    return str(folder / "packed")


def moved(coco: dict[str, Any], image: int, annotation: int, category: dict[int, int]) -> Any:
    """Images and annotations of exported COCO with other ids."""
    return (
        [{**one, "id": one["id"] + image} for one in coco["images"]],
        [
            {
                **one,
                "id": one["id"] + annotation,
                "image_id": one["image_id"] + image,
                "category_id": category[one["category_id"]],
            }
            for one in coco["annotations"]
        ],
    )


def test_a_joined_dataset_is_its_parts_with_other_ids(two, tmp_path):
    out = str(tmp_path / "both")
    joined = join(two, out)
    first, second = (open_dataset(uri).coco() for uri in two)
    both = open_dataset(out)
    exported = both.coco()
    # Ids 1 to 3 meet 1 and 2; the greatest annotation id of the first is 40.
    images, annotations = moved(second, 2, 50, {3: 7, 9: 3})
    assert exported["images"] == first["images"] + images
    assert exported["annotations"] == first["annotations"] + annotations
    assert exported["categories"] == first["categories"]
    assert [str(part) for part in joined.parts] == [
        "2 images, ids as they were",
        "3 images, image ids + 2; annotation ids + 50; category ids: 3 is 7, 9 is 3",
    ]
    assert verify(out).errors == ()
    assert both.image_ids().tolist() == [1, 2, 3, 4, 5]
    # Images without an object do not train, and labels are those of the shards' category ids.
    assert [both.row(row).image_id for row in both.for_training(Filter()).rows()] == [1, 2, 3, 5]
    labels = [both.index.annotation_columns(shard)[0].tolist() for shard in range(5)]
    assert labels == [[0], [1], [0], [], [1]]
    contents = [bytes(open_dataset(two[1]).row(row).content) for row in range(3)]
    assert [bytes(both.row(row).content) for row in (2, 3, 4)] == contents


def test_join_goes_on_after_an_interruption_and_changes_nothing_once_it_is_done(
    two, tmp_path, monkeypatch
):
    whole = join(two, str(tmp_path / "whole"))
    out = str(tmp_path / "both")
    real = join_module._write_shard

    def cut(*words: Any) -> Any:
        if words[-1].number == 3:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(join_module, "_write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        join(two, out)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no manifest"):
        open_dataset(out)
    resumed = join(two, out)
    assert resumed.resumed_shards == 3
    assert resumed.manifest == whole.manifest
    again = join(two, out)
    assert (again.unchanged, again.parts) == (True, resumed.parts)
    with pytest.raises(ValueError, match="holds a dataset packed from other inputs"):
        join(two[::-1], out)


def test_datasets_that_label_other_things_join_on_demand_alone(two, tmp_path):
    other = packed(
        tmp_path / "other",
        [box_annotation(5, category_id=3), box_annotation(6, category_id=4)],
        seed=90,
        categories=[{"id": 3, "name": "bird"}, {"id": 4, "name": "cat"}],
    )
    with pytest.raises(ValueError, match=r"has no 'dog' and alone has 'bird'; .*with --union"):
        join([two[0], other], str(tmp_path / "both"))
    joined = join([two[0], other], str(tmp_path / "both"), union=True)
    names = {one["id"]: one["name"] for one in joined.manifest.categories}
    assert names == {3: "cat", 7: "dog", 8: "bird"}
    assert [str(one) for one in joined.remarks] == [
        "2 categories that one of the datasets does not label: there it trains as background "
        f"('bird' in {two[0]}; 'dog' in {other})"
    ]
    counted = [a["category_id"] for a in open_dataset(str(tmp_path / "both")).coco()["annotations"]]
    assert counted == [3, 7, 8, 3]


def test_what_is_odd_of_datasets_together_is_counted(tmp_path):
    licences = [{"id": 1, "name": "mine"}], [{"id": 1, "name": "yours"}]
    folders = []
    for name, licence in zip(("a", "b"), licences, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        annotation = box_annotation(1)
        if name == "b":
            annotation.pop("segmentation")
        file = write_coco(folder, [annotation])
        file.write_text(json.dumps({**json.loads(file.read_text()), "licenses": licence}))
        pack_folder(folder)
        folders.append(str(folder / "packed"))
    joined = join(folders, str(tmp_path / "both"))
    assert {remark.kind: remark.count for remark in joined.remarks} == {
        "no_mask": 1,
        "same_image": 1,
        "licence": 1,
    }
    assert [one["name"] for one in joined.manifest.licenses] == ["mine", "yours"]


def test_a_category_has_the_keypoints_of_the_dataset_that_names_them(tmp_path):
    def person(name: str, seed: int, category: dict[str, Any], **fields: Any) -> str:
        annotations = [box_annotation(1, category_id=1, **fields)]
        return packed(tmp_path / name, annotations, seed=seed, categories=[category])

    points = {"keypoints": [6, 6, 2, 9, 9, 1], "num_keypoints": 2}
    bare = person("bare", 1, {"id": 1, "name": "person"})
    named = person("named", 2, PERSON, **points)
    joined = join([bare, named], str(tmp_path / "both"))
    assert joined.manifest.has_keypoints
    assert joined.manifest.coco_categories[0].keypoints == ("nose", "tail")
    other = person("other", 3, {**PERSON, "keypoints": ["tail", "nose"]}, **points)
    with pytest.raises(ValueError, match="category 'person' has other keypoints than"):
        join([named, other], str(tmp_path / "three"))


def test_ids_of_categories_are_the_first_datasets_also_from_zero(tmp_path):
    """Label tools count from 0; a dataset of another tool has the same names from 1."""
    zero = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    one = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bird"}]
    objects = [
        [box_annotation(1 + k, category_id=c["id"]) for k, c in enumerate(categories)]
        for categories in (zero, one)
    ]
    uris = [
        packed(tmp_path / name, annotations, seed=seed, categories=categories)
        for name, annotations, seed, categories in (
            ("zero", objects[0], 1, zero),
            ("one", objects[1], 2, one),
        )
    ]
    joined = join(uris, str(tmp_path / "both"), union=True)
    names = {c.id: c.name for c in joined.manifest.coco_categories}
    assert names == {0: "cat", 1: "dog", 3: "bird"}
    exported = open_dataset(str(tmp_path / "both")).coco()["annotations"]
    assert [a["category_id"] for a in exported] == [0, 1, 0, 1, 3]
    twins = packed(
        tmp_path / "twins", [], categories=[{"id": 0, "name": "cat"}, {"id": 5, "name": "cat"}]
    )
    with pytest.raises(ValueError, match=r"twins.*two categories are named 'cat'"):
        join([uris[0], twins], str(tmp_path / "three"), union=True)


def test_pairs_that_a_dataset_names_are_not_overruled(tmp_path):
    def person(name: str, seed: int, **fields: Any) -> str:
        category = {**PERSON, "keypoints": ["l", "r"], **fields}
        annotation = box_annotation(1, category_id=1, keypoints=[6, 6, 2, 9, 9, 1], num_keypoints=2)
        return packed(tmp_path / name, [annotation], seed=seed, categories=[category])

    silent = person("silent", 1)
    swapped = person("swapped", 2, flip_pairs=[["l", "r"]])
    other_way = person("other_way", 3, flip_pairs=[["r", "l"]])
    none = person("none", 4, flip_pairs=[])
    joined = join([silent, swapped, other_way], str(tmp_path / "three"))
    assert joined.manifest.coco_categories[0].flip_pairs == (("l", "r"),)
    with pytest.raises(ValueError, match="has other flip_pairs than"):
        join([none, swapped], str(tmp_path / "two"))


def test_what_cannot_be_joined_is_refused_in_one_line(two, tmp_path):
    out = str(tmp_path / "both")
    with pytest.raises(ValueError, match="at least two datasets"):
        join(two[:1], out)
    with pytest.raises(ValueError, match="is the same dataset as"):
        join([*two, two[0]], out)
    with pytest.raises(ValueError, match="is one of the datasets; give --out another folder"):
        join(two, two[1])
    with pytest.raises(ValueError, match=r"no manifest.json there"):
        join([two[0], str(tmp_path)], out)
    huge = packed(
        tmp_path / "huge",
        [box_annotation(2**63 - 5), box_annotation(1)],
        seed=70,
        categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    )
    with pytest.raises(ValueError, match=r"annotation ids would grow to .*beyond 64 bits"):
        join([two[0], huge], out)
    shard = next(Path(two[1]).glob("shard-00001.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"shard-00001.arrow: sha256 .*pack the data again"):
        join(two, out)
    with pytest.raises(ValueError, match="no manifest"):
        open_dataset(out)


def test_real_datasets_join_and_their_export_is_both(coco_mini, tmp_path):
    """Val with the ids of train: the same numbers mean other images."""
    train = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    val = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    ids = [image["id"] for image in train["images"]]
    taken = dict(zip((image["id"] for image in val["images"]), ids, strict=False))
    val["images"] = [{**image, "id": taken[image["id"]]} for image in val["images"]]
    val["annotations"] = [{**one, "image_id": taken[one["image_id"]]} for one in val["annotations"]]
    uris = []
    for name, coco in (("train", train), ("val", val)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(coco))
        uris.append(str(tmp_path / name))
        pack([file], str(coco_mini / f"{name}2017"), uris[-1], PackOptions())
    joined = join(uris, str(tmp_path / "both"))
    shift = joined.parts[1].image_shift
    assert shift > max(ids) - min(ids)
    both = open_dataset(str(tmp_path / "both"))
    exported = both.coco()
    same = {one["id"]: one["id"] for one in train["categories"]}
    first, second = (open_dataset(uri).coco() for uri in uris)
    images, annotations = moved(second, shift, joined.parts[1].annotation_shift, same)
    assert exported["images"] == first["images"] + images
    assert exported["annotations"] == first["annotations"] + annotations
    assert len(np.unique(both.image_ids())) == len(ids) + len(val["images"])
