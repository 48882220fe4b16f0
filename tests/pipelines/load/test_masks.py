from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from pipelines.coco.records import Rle
from pipelines.load.masks import crop_rle, mask_crops
from tests.pipelines.tiny_coco import box_annotation, packed_coco


def test_a_polygon_crop_agrees_with_a_fine_raster_of_the_whole_image(shapes, tmp_path):
    star = [
        [
            12.3,
            4.1,
            15.2,
            12.0,
            25.7,
            13.1,
            17.0,
            18.4,
            20.1,
            27.9,
            12.3,
            21.0,
            4.9,
            27.0,
            8.1,
            17.2,
            2.2,
            12.4,
            10.0,
            11.5,
        ]
    ]
    box = np.array([[2.2, 4.1, 25.7, 27.9]])
    row = packed_coco(tmp_path, [box_annotation(1, segmentation=star)]).row(0)
    [crop] = mask_crops(row.annotations, [0], box, 112)
    factor = 16
    fine = rle_tools.decode(
        rle_tools.frPyObjects([[v * factor for v in star[0]]], 30 * factor, 40 * factor)
    )[..., 0]
    steps = (np.arange(112) + 0.5) / 112
    x, y = ((box[0, k] + steps * (box[0, k + 2] - box[0, k])) * factor for k in (0, 1))
    expected = fine[y.astype(int)[:, None], x.astype(int)[None]]
    assert (crop != expected).mean() < 0.01


def test_parts_of_one_object_are_joined_and_kept_from_others(tmp_path):
    two_parts = [[5, 5, 10, 5, 10, 15, 5, 15], [12, 5, 15, 5, 15, 15, 12, 15]]
    annotations = [box_annotation(1, segmentation=two_parts), box_annotation(2)]
    row = packed_coco(tmp_path, annotations).row(0)
    crops = mask_crops(row.annotations, [1, 0], np.array([[5.0, 5, 15, 15]] * 2), 20)
    assert crops[0].all()
    np.testing.assert_array_equal(crops[1, 10], [1] * 10 + [0] * 4 + [1] * 6)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_rle_crop_takes_the_pixel_under_each_sample(compressed):
    mask = np.random.default_rng(0).integers(0, 2, (9, 7)).astype(np.uint8)
    if compressed:
        rle = Rle(9, 7, rle_tools.encode(np.asfortranarray(mask))["counts"].decode())
    else:
        flat = mask.ravel(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *ends, flat.size]).tolist()
        rle = Rle(9, 7, ([0] if flat[0] else []) + counts)
    crop = crop_rle(rle, np.array([2.0, 1.0, 6.0, 9.0]), 16)
    np.testing.assert_array_equal(crop, np.repeat(np.repeat(mask[1:9, 2:6], 2, 0), 4, 1))
