"""What a dataset says oddly: read, counted and told, or refused where it makes no sense."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.coco.decoding import decode_pixels
from pipelines.pack.pack import Packed
from pipelines.shards.dataset import open_dataset
from tests.pipelines.tiny_coco import box_annotation, noise_image, pack_folder, write_coco


def remarks_of(packed: Packed) -> dict[str, int]:
    return {remark.kind: remark.count for remark in packed.remarks}


def written(folder: Path, image: Image.Image, orientation: int = 1, name: str = "1.jpg") -> None:
    (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "images" / name, quality=95, exif=exif)


def image_record(id: int = 1, width: int = 40, height: int = 30, **fields: Any) -> dict[str, Any]:
    return {"id": id, "file_name": f"{id}.jpg", "width": width, "height": height, **fields}


# --- numbers and names ----------------------------------------------------------------------------


def test_numbers_that_differ_in_their_last_digits_are_the_same(tmp_path):
    """Real files: 91 areas of coco-mini's val differ by 1e-15 from those of its keypoints."""
    first = write_coco(tmp_path, [box_annotation(1, area=100.1)])
    second = write_coco(tmp_path, [box_annotation(1, area=100.1 * (1 + 1e-14))], name="k.json")
    packed = pack_folder(tmp_path, first, second)
    assert remarks_of(packed) == {"rounded": 1}
    [remark] = packed.remarks
    assert "annotation 1: area 100.1 and 100.10000000000" in str(remark)
    [annotation] = open_dataset(str(tmp_path / "packed")).coco()["annotations"]
    assert annotation["area"] == 100.1  # the first file's
    assert json.loads((tmp_path / "packed/remarks.json").read_text())[0]["kind"] == "rounded"
    assert remarks_of(pack_folder(tmp_path, first, second)) == {"rounded": 1}  # told again


@pytest.mark.parametrize("change", [{"area": 100.2}, {"bbox": [5, 5, 10, 10.1]}, {"iscrowd": 1}])
def test_numbers_that_differ_are_not_merged(tmp_path, change):
    first = write_coco(tmp_path, [box_annotation(1)])
    second = write_coco(tmp_path, [box_annotation(1, **change)], name="k.json")
    with pytest.raises(ValueError, match="merge only files of the same annotations"):
        pack_folder(tmp_path, first, second)


def test_whole_numbers_written_as_floats_are_read_and_counted(tmp_path):
    written(tmp_path, noise_image())
    image = image_record(id=1.0, width=40.0, file_name="1.jpg")
    write_coco(tmp_path, [box_annotation(0.0, image_id=1.0, category_id=3.0)], images=[image])
    packed = pack_folder(tmp_path)
    assert remarks_of(packed) == {"whole_float": 2, "id_zero": 1}
    [annotation] = open_dataset(str(tmp_path / "packed")).coco()["annotations"]
    assert (annotation["id"], annotation["image_id"], annotation["category_id"]) == (0, 1, 3)


@pytest.mark.parametrize(
    ("in_json", "on_disk"), [("sub\\1.jpg", "sub/1.jpg"), ("a%20b.jpg", "a b.jpg")]
)
def test_a_name_that_means_one_file_finds_it(tmp_path, in_json, on_disk):
    written(tmp_path, noise_image(), name=on_disk)
    write_coco(tmp_path, [box_annotation(1)], images=[image_record(file_name=in_json)])
    assert remarks_of(pack_folder(tmp_path)) == {"renamed_file": 1}


def test_a_file_of_that_very_name_comes_first(tmp_path):
    written(tmp_path, noise_image(), name="a%20b.jpg")
    written(tmp_path, noise_image(seed=1), name="a b.jpg")
    write_coco(tmp_path, [box_annotation(1)], images=[image_record(file_name="a%20b.jpg")])
    assert remarks_of(pack_folder(tmp_path)) == {}


def test_an_absolute_name_gets_a_remedy_that_works(tmp_path):
    written(tmp_path, noise_image())
    name = f"{tmp_path}/images/1.jpg"
    path = write_coco(tmp_path, [box_annotation(1)], images=[image_record(file_name=name)])
    with pytest.raises(ValueError, match="is an absolute path") as caught:
        pack_folder(tmp_path)
    _, search, replacement = str(caught.value).split("sed -i '")[1].split("'")[0].split("#")[:3]
    path.write_text(path.read_text().replace(search, replacement))
    assert pack_folder(tmp_path).manifest.num_images == 1


def test_one_file_under_several_ids_is_counted(tmp_path):
    written(tmp_path, noise_image())
    records = [image_record(id, file_name="1.jpg") for id in (1, 2, 3)]
    write_coco(tmp_path, [box_annotation(1)], images=records)
    assert remarks_of(pack_folder(tmp_path)) == {"same_file": 2}


# --- image files ----------------------------------------------------------------------------------


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_a_jpeg_with_stray_bytes_is_read_to_the_bit(tmp_path):
    whole = jpeg(noise_image())
    stray = whole[:-2] + b"\x00" * 7 + whole[-2:]
    assert np.array_equal(decode_pixels(stray), decode_pixels(whole))
    write_coco(tmp_path, [box_annotation(1)])
    (tmp_path / "images/1.jpg").write_bytes(stray)
    assert remarks_of(pack_folder(tmp_path)) == {"stray_bytes": 1}


def test_a_jpeg_that_ends_too_early_is_refused_as_before(tmp_path):
    whole = jpeg(noise_image())
    for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\x00" * 7 + b"\xff\xd9"):
        with pytest.raises(RuntimeError):
            decode_pixels(damaged)


def test_12_bits_in_a_16_bit_png_are_told(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (30, 40)).astype(np.uint16)
    (tmp_path / "images").mkdir()
    for id, brightness in ((1, 1), (2, 16)):  # the second one uses its 16 bits
        Image.fromarray(values * np.uint16(brightness)).save(tmp_path / f"images/{id}.png")
    records = [image_record(id, file_name=f"{id}.png") for id in (1, 2)]
    write_coco(tmp_path, [box_annotation(1)], images=records)
    assert remarks_of(pack_folder(tmp_path)) == {"twelve_bits": 1}


def orientations(folder: Path) -> list[int]:
    dataset = open_dataset(str(folder / "packed"))
    return [dataset.row(row).orientation for row in dataset.rows()]


# Stored size, orientation and the size in the JSON of images that look the same either way.
ALIKE = (((40, 30), 3, (40, 30)), ((32, 32), 6, (32, 32)))


@pytest.mark.parametrize(
    ("stored", "exif", "expected"),
    [
        # An oblong image that lies turned decides for those that look the same either way.
        ([((40, 30), 6, (30, 40)), *ALIKE], "auto", [6, 3, 6]),
        ([((40, 30), 6, (40, 30)), *ALIKE], "auto", [1, 1, 1]),
        ([((40, 30), 3, (40, 30))], "auto", [3]),  # no sign: as browsers do
        ([((40, 30), 3, (40, 30))], "ignore", [1]),
        ([((40, 30), 3, (40, 30)), ((40, 30), 1, (40, 30))], "apply", [3, 1]),
    ],
)  # fmt: skip
def test_one_exif_rule_for_a_dataset(tmp_path, stored, exif, expected):
    records = []
    for id, (size, orientation, stated) in enumerate(stored, 1):
        written(tmp_path, noise_image(*size, seed=id), orientation, f"{id}.jpg")
        records.append(image_record(id, *stated))
    write_coco(tmp_path, [box_annotation(1)], images=records)
    # a shard for each image: the image that decides is in another one
    packed = pack_folder(tmp_path, exif=exif, shard_mib=0.001)
    assert orientations(tmp_path) == expected
    turned = sum(orientation > 1 for orientation in expected)
    odd = sum(orientation > 1 for _, orientation, _ in stored)
    wanted = {"exif_applied": turned, "exif_ignored": odd - turned}
    assert remarks_of(packed) == {kind: count for kind, count in wanted.items() if count}


def test_a_forced_rule_meets_the_sizes_of_the_json(tmp_path):
    written(tmp_path, noise_image(40, 30), 6)
    write_coco(tmp_path, [box_annotation(1)], images=[image_record(1, 30, 40)])
    with pytest.raises(ValueError, match="the file is 40 x 30, the JSON says 30 x 40"):
        pack_folder(tmp_path, exif="ignore")


# --- fields against each other --------------------------------------------------------------------


def scattered(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Boxes with the polygon of each."""
    rng = np.random.default_rng(seed)
    made = []
    for id in range(1, count + 1):
        x, y = rng.uniform(8, 20, 2)
        w, h = rng.uniform(5, 9, 2)
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        made.append(box_annotation(id, bbox=[x, y, w, h], segmentation=[polygon], area=w * h))
    return made


def as_corners(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [a | {"bbox": [x, y, x + w, y + h]} for a in annotations for x, y, w, h in [a["bbox"]]]


def test_boxes_that_are_corners_are_refused(tmp_path):
    good = scattered(12)
    write_coco(tmp_path, as_corners(good))
    with pytest.raises(ValueError, match=r"boxes look like corners .* \(12 of 12 fit their masks"):
        pack_folder(tmp_path, on_error="skip")
    without_masks = [a | {"segmentation": None} for a in as_corners(good)]
    write_coco(tmp_path, without_masks)
    with pytest.raises(ValueError, match=r"look like corners .* of 12 reach over the edge"):
        pack_folder(tmp_path, on_error="skip")
    write_coco(tmp_path, good)
    assert remarks_of(pack_folder(tmp_path)) == {}


def test_sound_boxes_over_the_edge_of_tiles_are_no_corners(tmp_path):
    """One unclipped field a tile: as corners they would leave the image too."""
    write_coco(
        tmp_path,
        [
            box_annotation(n, image_id=n, bbox=[-10, -10, 60, 50], segmentation=None)
            for n in range(1, 11)
        ],
        num_images=10,
    )
    assert remarks_of(pack_folder(tmp_path)) == {"box_over_edge": 10}


def test_changed_images_are_noticed_under_another_name(tmp_path):
    for seed, side in ((0, (40, 30)), (1, (40, 30))):
        written(tmp_path, noise_image(*side, seed=seed), name="sub/1.jpg")
        if seed:  # another size of the file, the same name
            path = tmp_path / "images/sub/1.jpg"
            path.write_bytes(path.read_bytes() + b"")
            noise_image(*side, seed=seed).save(path, quality=60)
            with pytest.raises(ValueError, match="packed from other inputs"):
                pack_folder(tmp_path)
        else:
            write_coco(tmp_path, [box_annotation(1)], images=[image_record(file_name="sub\\1.jpg")])
            pack_folder(tmp_path)


def test_a_box_away_from_its_polygon_is_named_and_counted(tmp_path):
    annotations = scattered(12)
    for annotation in annotations[:5]:
        annotation["bbox"] = [0, 0, 5, 5]
    write_coco(tmp_path, annotations)
    packed = pack_folder(tmp_path)
    assert remarks_of(packed) == {"box_off_mask": 5}
    text = str(packed.remarks[0])
    assert "5 boxes far from the mask of their object (annotation 1: bbox [0, 0, 5, 5]" in text
    assert text.endswith("; ...)")


def test_a_flat_polygon_and_a_missing_mask_are_told(tmp_path):
    flat = box_annotation(2, segmentation=[[5, 5, 10, 10, 15, 15]])
    write_coco(tmp_path, [box_annotation(1), flat, box_annotation(3, segmentation=None)])
    assert remarks_of(pack_folder(tmp_path)) == {"flat_mask": 1, "no_mask": 1}


def test_without_any_mask_no_object_lacks_one(tmp_path):
    write_coco(tmp_path, [box_annotation(1, segmentation=None)])
    assert remarks_of(pack_folder(tmp_path)) == {}


def test_real_coco_has_nothing_to_remark_but_rounding(coco_mini, tmp_path):
    """The checks of boxes and masks let COCO's own pass."""
    from pipelines.pack.pack import PackOptions, pack

    names = ("instances", "person_keypoints")
    files = [coco_mini / f"annotations/{name}_val2017.json" for name in names]
    packed = pack(files, str(coco_mini / "val2017"), str(tmp_path / "packed"), PackOptions())
    assert remarks_of(packed) == {"rounded": 91}
