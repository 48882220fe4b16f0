from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract.data import ColourJitter, DataConfig, Filter
from contract.model import ImageInput
from model.structures import Batch
from pipelines.load.blocks import Undo
from pipelines.load.loader import EvalLoader, TrainLoader, TrainStep
from pipelines.shards.dataset import open_dataset
from tests.pipelines.tiny_coco import box_annotation, packed_coco


def config(folder: Path, **fields: Any) -> DataConfig:
    base = {
        "train": str(folder / "train"),
        "val": str(folder / "val"),
        "short_sides_px": (48, 64, 80),
        "max_side_px": 96,
        "shuffle_window_shards": 3,
        "bucket_batches": 3,
        "mask_crop_side": 28,
        "num_loader_workers": 0,
    }
    return DataConfig(**(base | fields))


def loader(cfg: DataConfig, **fields: Any) -> TrainLoader:
    base = {
        "seed": 5,
        "global_batch": 6,
        "rank": 0,
        "world_size": 1,
        "max_images_per_forward": 99,
        "masks": True,
    }
    return TrainLoader(cfg, open_dataset(cfg.train), **(base | fields))


def take(stream: TrainLoader, count: int) -> list[TrainStep]:
    steps = list(itertools.islice(stream, count))
    stream.close()
    return steps


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([getattr(batch, name) for batch in batches]) for name in vars(batches[0])
    }


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("world_size", [2, 4, 5, 6])
def test_every_world_size_sees_the_same_global_batches(shapes, world_size):
    cfg = config(shapes, colour=ColourJitter(brightness=0.2, contrast=0.2, saturation=0.2))
    alone = take(loader(cfg, num_keypoints=0), 9)
    ranks = [take(loader(cfg, rank=rank, world_size=world_size), 9) for rank in range(world_size)]
    for step, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert {(part.step, part.epoch) for part in parts} == {(step.step, step.epoch)}
        assert_equal(
            joined([batch for part in parts for batch in part.batches]), joined(step.batches)
        )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(shapes, num_workers):
    cfg = config(shapes)
    alone = take(loader(cfg, start_step=4), 5)
    others = take(loader(config(shapes, num_loader_workers=num_workers), start_step=4), 5)
    for one, two in zip(alone, others, strict=True):
        assert (one.step, one.epoch) == (two.step, two.epoch)
        assert_equal(joined(one.batches), joined(two.batches))


def test_blocks_are_registered_while_the_loader_is_open(shapes):
    """The consumer's device may read them until `close`, however often the stream is iterated."""
    registered: set[int] = set()

    def register(address: int, size: int) -> Undo:
        assert size > 0
        registered.add(address)
        return lambda: registered.remove(address)

    stream = loader(config(shapes, num_loader_workers=1), register=register)
    steps = iter(stream)
    batches = [batch for _ in range(2) for batch in next(steps).batches]
    assert len(registered) == len(batches)
    stream.close()
    assert not registered
    assert all(batch.images.sum() for batch in batches), "a batch outlives the loader"


@pytest.mark.parametrize("start", [1, 6, 7, 13, 1_000_000])
def test_resuming_equals_never_having_stopped(shapes, start):
    cfg = config(shapes)
    before = 0 if start < 100 else start - 1
    expected = take(loader(cfg, start_step=before), start - before + 2)[start - before :]
    resumed = take(loader(cfg, start_step=start), 2)
    for one, two in zip(expected, resumed, strict=True):
        assert one.step == two.step
        assert_equal(joined(one.batches), joined(two.batches))


def test_chunks_share_the_canvas_of_the_global_batch(shapes):
    cfg = config(shapes)
    whole, cut = take(loader(cfg), 4), take(loader(cfg, max_images_per_forward=4, rank=0), 4)
    for one, two in zip(whole, cut, strict=True):
        assert [len(batch) for batch in two.batches] == [3, 3]
        assert {batch.images.shape[2:] for batch in two.batches} == {
            one.batches[0].images.shape[2:]
        }
        assert {batch.boxes_xyxy.shape[1] for batch in two.batches} == {
            one.batches[0].boxes_xyxy.shape[1]
        }
        assert_equal(joined(two.batches), joined(one.batches))


def test_few_canvases_hold_the_same_images(shapes):
    own, few = (
        take(loader(config(shapes, num_canvases=number, canvas_multiple_px=1)), 6)
        for number in (0, 2)
    )
    pairs = [
        pair
        for one, two in zip(own, few, strict=True)
        for pair in zip(one.batches, two.batches, strict=True)
    ]
    assert len({one.images.shape for one, _ in pairs}) > 2
    assert len({(two.images.shape, two.valid.shape) for _, two in pairs}) <= 2
    for one, two in pairs:
        (height, width), objects = one.images.shape[2:], one.valid.shape[1]
        assert torch.equal(two.images[:, :, :height, :width], one.images)
        assert two.images.sum() == one.images.sum()
        assert torch.equal(two.boxes_xyxy[:, :objects], one.boxes_xyxy)
        assert two.valid.sum() == one.valid.sum()
        assert torch.equal(two.noise_keys, one.noise_keys)


def test_sample_ids_are_those_of_the_batches(shapes):
    stream = loader(config(shapes))
    for step in take(stream, 9):
        assert step.batches[0].sample_ids.tolist() == stream.sample_ids(step.step)
    assert stream.steps_per_epoch == 7
    epoch = {i for step in range(7) for i in stream.sample_ids(step)}
    assert len(epoch) == 40


def test_noise_differs_by_epoch_and_seed_but_not_by_position(shapes):
    cfg = config(shapes, short_sides_px=(64,))
    keys = {}
    for seed in (0, 1):
        for step in take(loader(cfg, seed=seed), 14):
            for batch in step.batches:
                for image, key in zip(
                    batch.sample_ids.tolist(), batch.noise_keys.tolist(), strict=True
                ):
                    assert keys.setdefault((seed, step.epoch, image), key) == key
    assert len(set(keys.values())) == len(keys) == 160


def test_a_batch_is_what_its_contract_says(shapes):
    for step in take(loader(config(shapes), num_keypoints=0), 7):
        [batch] = step.batches
        count, objects = batch.labels.shape
        assert batch.images.dtype == torch.uint8
        assert all(side % 32 == 0 for side in batch.images.shape[2:])
        assert objects in (4, 8, 16)
        assert batch.mask_crops.shape == (count, objects, 28, 28)
        assert batch.keypoints.shape == (count, objects, 0, 3)
        assert batch.proposals_xyxy.shape == (count, 0, 4)
        assert batch.mask_crops.max() == 1
        assert batch.labels.max() < 4
        assert not (batch.valid[:, 1:] & ~batch.valid[:, :-1]).any(), "padding comes last"
        for b in range(count):
            height, width = batch.sizes[b].tolist()
            assert batch.images[b, :, height:].sum() == batch.images[b, :, :, width:].sum() == 0
            boxes = batch.boxes_xyxy[b, batch.valid[b]]
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= width).all()
            assert (boxes[:, 3] <= height).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert batch.boxes_xyxy[~batch.valid].sum() == batch.mask_crops[~batch.valid].sum() == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_flipping_mirrors_everything_exactly(shapes, seed):
    plain, flipped = (
        take(
            loader(
                config(shapes, flip_probability=p, filter=Filter(categories=("person",))),
                num_keypoints=17,
                seed=seed,
            ),
            5,
        )
        for p in (0.0, 1.0)
    )
    swap = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    for one, two in zip(plain, flipped, strict=True):
        a, b = one.batches[0], two.batches[0]
        for n in range(len(a)):
            height, width = a.sizes[n].tolist()
            assert torch.equal(
                a.images[n, :, :height, :width].flip(-1), b.images[n, :, :height, :width]
            )
            there = a.valid[n]
            torch.testing.assert_close(
                width - a.boxes_xyxy[n, there][:, [2, 0]], b.boxes_xyxy[n, there][:, [0, 2]]
            )
            assert torch.equal(a.mask_crops[n].flip(-1), b.mask_crops[n])
            before, after = a.keypoints[n, there][:, swap], b.keypoints[n, there]
            assert torch.equal(before[..., 2], after[..., 2])
            labelled = before[..., 2] > 0
            torch.testing.assert_close(width - before[labelled][:, 0], after[labelled][:, 0])
            assert torch.equal(before[labelled][:, 1], after[labelled][:, 1])
            assert after[~labelled].sum() == 0


def one_image(folder: Path, annotations: list[dict[str, Any]], **fields: Any) -> Batch:
    """The 40 x 30 image at twice its size."""
    category = {"id": 3, "name": "cat", "keypoints": ["left_eye", "right_eye"]}
    packed_coco(folder, annotations, categories=[category, {"id": 7, "name": "dog"}])
    cfg = DataConfig(
        train=str(folder / "packed"),
        val="v",
        short_sides_px=(60,),
        max_side_px=999,
        flip_probability=0,
        num_loader_workers=0,
        mask_crop_side=20,
        **fields,
    )
    stream = TrainLoader(
        cfg,
        open_dataset(cfg.train),
        seed=0,
        global_batch=1,
        rank=0,
        world_size=1,
        max_images_per_forward=1,
        masks=True,
        num_keypoints=2 if "filter" in fields else 0,
    )
    return take(stream, 1)[0].batches[0]


def test_boxes_masks_and_keypoints_by_hand(tmp_path):
    triangle = [[5, 5, 15, 5, 5, 15]]
    annotation = box_annotation(
        1, segmentation=triangle, keypoints=[5, 6, 2, 0, 0, 0], num_keypoints=1
    )
    batch = one_image(
        tmp_path, [annotation, box_annotation(2, category_id=7)], filter=Filter(categories=("cat",))
    )
    assert batch.sizes.tolist() == [[60, 80]]
    assert batch.original_sizes.tolist() == [[30, 40]]
    assert batch.images.shape == (1, 3, 64, 96)
    assert batch.valid.tolist() == [[True, False, False, False]]
    assert batch.boxes_xyxy[0, 0].tolist() == [10, 10, 30, 30]
    assert batch.keypoints[0, 0].tolist() == [[11, 13, 2], [0, 0, 0]]
    rows, columns = np.mgrid[:20, :20] + 0.5
    inside = batch.mask_crops[0, 0].numpy()
    away = abs(rows + columns - 20) > 1.5
    np.testing.assert_array_equal(inside[away], (rows + columns < 20)[away])


def test_crowds_degenerate_and_small_objects_do_not_train(tmp_path):
    annotations = [
        box_annotation(1, iscrowd=1, segmentation={"size": [30, 40], "counts": [100, 50, 1050]}),
        box_annotation(2, bbox=[5, 5, 0, 10]),
        box_annotation(3, area=3, category_id=7),
        box_annotation(
            4,
            bbox=[30, 20, 30, 30],
            area=900,
            category_id=7,
            segmentation=[[30, 20, 60, 20, 60, 50, 30, 50]],
        ),
        {key: value for key, value in box_annotation(5).items() if key != "segmentation"},
    ]
    chosen = Filter(min_area_px=10, categories=("cat", "dog"))
    batch = one_image(tmp_path, annotations, filter=chosen)
    boxes = batch.boxes_xyxy[batch.valid].tolist()
    assert boxes == [[60, 40, 80, 60], [10, 10, 30, 30]], "clipped to the image"
    assert batch.labels[batch.valid].tolist() == [1, 0]
    # an object without a mask trains its box alone: left out, its place would be background
    assert batch.mask_crops[batch.valid].flatten(1).any(1).tolist() == [1, 0]
    view = open_dataset(str(tmp_path / "packed")).for_training(chosen)
    assert view.index.census(view.selection).line(masks=True, keypoints=False) == (
        "2 of 5 objects train: 1 crowds, 1 without a box, 1 below min_area_px, "
        "1 without mask: boxes only"
    )


def test_images_without_usable_objects_can_be_kept(tmp_path):
    batch = one_image(tmp_path, [box_annotation(1, iscrowd=1)], filter=Filter(drop_empty=False))
    assert batch.valid.sum() == 0
    assert batch.boxes_xyxy.shape[1] == 0


def test_filters_narrow_categories_and_images(shapes):
    cfg = config(shapes, filter=Filter(categories=("triangle",)))
    stream = loader(cfg)
    assert stream.dataset.category_ids == (4,)
    for step in take(stream, stream.steps_per_epoch):
        assert step.batches[0].valid.any(1).all()
        assert step.batches[0].labels.max() == 0
    with pytest.raises(ValueError, match="no category 'hoook' in the dataset; there are person"):
        loader(config(shapes, filter=Filter(categories=("hoook",))))


def test_requiring_keypoints_leaves_out_images_and_keeps_every_object(tmp_path):
    """The published recipes: a person without keypoints must not train as background."""
    points = {"keypoints": [8, 8, 2], "num_keypoints": 1}
    bare = {"keypoints": [0, 0, 0], "num_keypoints": 0}
    annotations = [
        box_annotation(1, **points),
        box_annotation(2, **bare),
        box_annotation(3, image_id=2, **bare),
        box_annotation(4, image_id=3),
    ]
    categories = [{"id": 3, "name": "cat", "keypoints": ["nose"]}]
    packed_coco(tmp_path, annotations, num_images=3, categories=categories)
    data = open_dataset(str(tmp_path / "packed"))
    view = data.for_training(Filter(require_keypoints=True))
    assert view.image_ids().tolist() == [1]
    [row] = view.rows()
    assert len(view.index.usable_objects(row, view.selection)[0]) == 2
    assert data.for_training(Filter()).image_ids().tolist() == [1, 2, 3]


def test_the_holdout_trains_nothing_and_evaluates(shapes):
    cfg = config(shapes, val=str(shapes / "train"), filter=Filter(holdout=0.3))
    stream = loader(cfg)
    trained = {i for step in range(stream.steps_per_epoch) for i in stream.sample_ids(step)}
    held = evaluated_ids(cfg, 1, 0)
    assert trained.isdisjoint(held)
    assert len(trained) + len(held) == 40
    assert 4 <= len(held) <= 20


def evaluated_ids(cfg: DataConfig, world_size: int, rank: int) -> list[int]:
    image = ImageInput(short_side_px=64, max_side_px=96)
    stream = EvalLoader(
        cfg, open_dataset(cfg.val), image, batch_size=4, rank=rank, world_size=world_size
    )
    return [i for batch in stream for i in batch.sample_ids.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_image_once(shapes, world_size):
    cfg = config(shapes)
    ids_of_ranks = [evaluated_ids(cfg, world_size, rank) for rank in range(world_size)]
    everything = sorted(i for part in ids_of_ranks for i in part)
    assert everything == sorted(image["id"] for image in open_dataset(cfg.val).coco()["images"])


def test_evaluation_keeps_images_without_annotations(tmp_path):
    packed_coco(tmp_path, [box_annotation(1, 2)], num_images=3)
    cfg = DataConfig(train="t", val=str(tmp_path / "packed"), num_loader_workers=0)
    assert sorted(evaluated_ids(cfg, 1, 0)) == [1, 2, 3]


def test_evaluation_batches_are_the_same_at_any_world_size_and_worker_count(shapes):
    image = ImageInput(short_side_px=64, max_side_px=96)

    def batches(workers: int, rank: int, world_size: int) -> list[Batch]:
        cfg = config(shapes, num_loader_workers=workers)
        stream = EvalLoader(
            cfg, open_dataset(cfg.val), image, batch_size=4, rank=rank, world_size=world_size
        )
        loaded = list(stream)
        stream.close()
        return loaded

    alone = batches(0, 0, 1)
    assert [len(batch) for batch in alone] == [4, 4, 2]
    for one, two in zip(
        alone, [*batches(2, 0, 2)[:1], *batches(0, 1, 2), *batches(0, 0, 2)[1:]], strict=True
    ):
        assert_equal(vars(one), vars(two))


@pytest.mark.parametrize("resize", ["antialias", "torchvision-detection"])
def test_test_time_sizes_follow_the_named_rule(tmp_path, resize):
    packed_coco(tmp_path, [], num_images=1)
    cfg = DataConfig(train="t", val=str(tmp_path / "packed"), num_loader_workers=0)
    image = ImageInput(short_side_px=50, max_side_px=999, resize=resize)
    [batch] = EvalLoader(cfg, open_dataset(cfg.val), image, batch_size=4, rank=0, world_size=1)
    assert batch.sizes.tolist() == [[50, 67 if resize == "antialias" else 66]]


def test_more_ranks_than_images_are_refused(shapes):
    with pytest.raises(ValueError, match=r"global_batch is 6 for 7 ranks"):
        loader(config(shapes), world_size=7)


def test_what_the_heads_need_must_be_in_the_data(tmp_path, shapes):
    packed_coco(tmp_path, [box_annotation(1, segmentation=[])])
    with pytest.raises(ValueError, match="has no masks"):
        loader(config(shapes, train=str(tmp_path / "packed")))
    with pytest.raises(ValueError, match=r"num_keypoints is 5, the data's categories have \[17\]"):
        loader(config(shapes, filter=Filter(categories=("person",))), num_keypoints=5)


def test_a_used_source_is_pickled_without_what_it_opened(shapes):
    stream = loader(config(shapes))
    take(stream, 2)
    assert len(pickle.dumps(stream._source)) < 20_000


def test_an_error_in_a_worker_arrives_as_it_is(shapes, tmp_path):
    import shutil

    copy = shutil.copytree(shapes, tmp_path / "copy")
    (copy / "train" / "shard-00000.arrow").unlink()
    with pytest.raises(RuntimeError, match=r"shard-00000\.arrow: is missing") as caught:
        take(loader(config(copy, num_loader_workers=1)), 8)
    assert "Traceback" not in str(caught.value)
