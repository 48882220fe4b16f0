from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from contract.data import DataConfig
from contract.model import ImageInput
from pipelines.load.loader import EvalLoader, TrainLoader
from pipelines.load.proposals import ProposalTable, write_proposals
from pipelines.shards.dataset import open_dataset


def rows(ids, seed=0):
    rng = np.random.default_rng(seed)
    for image_id in ids:
        count = int(rng.integers(0, 6))
        corners = rng.uniform(0, 30, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(1, 20, (count, 2))], 1).astype(
            np.float32
        )
        yield image_id, boxes, rng.random(count).astype(np.float32)


def test_proposals_come_back_best_first(tmp_path):
    path = str(tmp_path / "sub" / "p.arrow")
    written = list(rows([9, 3, 700, 5]))
    assert write_proposals(path, written) == 4
    table = pickle.loads(pickle.dumps(ProposalTable(path)))
    assert table.image_ids.tolist() == [3, 5, 9, 700]
    assert table.most == max(len(scores) for _, _, scores in written)
    for image_id, boxes, scores in written:
        order = np.argsort(-scores, kind="stable")
        found_boxes, found_scores = table.get(image_id)
        np.testing.assert_array_equal(found_boxes, boxes[order])
        np.testing.assert_array_equal(found_scores, scores[order])


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    written = list(rows(range(1, 600)))
    for name, order in (("a", written), ("b", written[::-1])):
        write_proposals(str(tmp_path / name), order)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_only_the_best_are_kept(tmp_path):
    path = str(tmp_path / "p")
    boxes = np.arange(20, dtype=np.float32).reshape(5, 4)
    write_proposals(
        path, [(1, boxes, np.array([0.1, 0.5, 0.3, 0.9, 0.2], np.float32))], max_per_image=2
    )
    np.testing.assert_array_equal(ProposalTable(path).get(1)[0], boxes[[3, 1]])


def test_what_is_wrong_is_named(tmp_path):
    path = str(tmp_path / "p")
    with pytest.raises(ValueError, match="image 3 are there twice"):
        write_proposals(path, [*rows([3]), *rows([3])])
    with pytest.raises(ValueError, match="no such file of proposals"):
        ProposalTable(path).get(1)
    write_proposals(path, rows([3]))
    with pytest.raises(ValueError, match="no proposals for image 4"):
        ProposalTable(path).get(4)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a file of proposals"):
        ProposalTable(str(tmp_path / "text")).get(1)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_loaders_scale_and_flip_proposals_with_the_image(shapes, tmp_path, flip):
    """Proposals that are the ground truth stay the ground truth."""
    dataset = open_dataset(str(shapes / "train"))
    path = str(tmp_path / "p")
    coco = dataset.coco()
    truth = {
        image["id"]: np.array(
            [
                [x, y, min(x + w, image["width"]), min(y + h, image["height"])]
                for a in coco["annotations"]
                if a["image_id"] == image["id"] and not a["iscrowd"]
                for x, y, w, h in [a["bbox"]]
            ],
            np.float32,
        ).reshape(-1, 4)
        for image in coco["images"]
    }
    write_proposals(
        path,
        [
            (key, boxes, np.linspace(1, 0, len(boxes), dtype=np.float32))
            for key, boxes in truth.items()
        ],
    )
    cfg = DataConfig(
        train="t",
        val="v",
        short_sides_px=(60, 100),
        max_side_px=120,
        flip_probability=flip,
        num_loader_workers=0,
    )
    fixed = {"rank": 0, "world_size": 1, "proposals_uri": path}
    stream = TrainLoader(
        cfg, dataset, seed=0, global_batch=4, max_images_per_forward=4, masks=False, **fixed
    )
    most = max(len(boxes) for boxes in truth.values())
    for step in itertools.islice(stream, 5):
        batch = step.batches[0]
        assert batch.proposals_xyxy.shape == (4, most, 4)
        for boxes, valid, proposals in zip(
            batch.boxes_xyxy, batch.valid, batch.proposals_xyxy, strict=True
        ):
            count = int(valid.sum())
            np.testing.assert_allclose(proposals[:count], boxes[:count], atol=1e-3)
            assert proposals[count:].abs().sum() == 0
    evaluation = EvalLoader(
        cfg, dataset, ImageInput(short_side_px=96, max_side_px=96), batch_size=4, **fixed
    )
    batch = next(iter(evaluation))
    scale = (batch.sizes[0] / batch.original_sizes[0]).numpy()
    expected = truth[int(batch.sample_ids[0])] * np.tile(scale[::-1], 2)
    np.testing.assert_allclose(batch.proposals_xyxy[0, : len(expected)], expected, rtol=1e-5)
