from __future__ import annotations

import torch

from model.structures import Batch
from pipelines.load.blocks import CAPACITY_STEP, Inbox, Outbox, Parcel, carve, private_block

SHAPES = {
    "images": (torch.uint8, (2, 3, 5, 7)),
    "sizes": (torch.int64, (2, 2)),
    "original_sizes": (torch.int64, (2, 2)),
    "sample_ids": (torch.int64, (2,)),
    "noise_keys": (torch.int64, (2,)),
    "boxes_xyxy": (torch.float32, (2, 4, 4)),
    "labels": (torch.int64, (2, 4)),
    "valid": (torch.bool, (2, 4)),
    "mask_crops": (torch.uint8, (2, 4, 0, 0)),
    "keypoints": (torch.float32, (2, 4, 0, 3)),
    "proposals_xyxy": (torch.float32, (2, 0, 4)),
}


def sent(outbox: Outbox, value: int, images: int = 2) -> Parcel:
    shapes = SHAPES | {"images": (torch.uint8, (images, 3, 5, 7))}
    batch = Batch(**carve(outbox.allocate, shapes))
    for tensor in vars(batch).values():
        tensor.fill_(value)
    return outbox.parcel([batch])


def test_tensors_of_a_block_are_of_the_types_and_shapes_asked_for_and_do_not_overlap():
    tensors = carve(private_block, SHAPES)
    for number, (name, (dtype, shape)) in enumerate(SHAPES.items()):
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == shape
        assert tensors[name].is_contiguous()
        tensors[name].fill_(number % 2)
    for number, name in enumerate(SHAPES):
        assert (tensors[name] == number % 2).all()


def test_a_block_is_filled_again_only_when_its_batch_is_gone():
    outbox, inbox = Outbox(), Inbox()
    parcels = [sent(outbox, 1), sent(outbox, 2)]
    assert [len(parcel.new) for parcel in parcels] == [1, 1], "two batches are alive"
    [one], [two] = (inbox.open(parcel) for parcel in parcels)
    labels = one.labels
    del one
    third = sent(outbox, 3)
    assert len(third.new) == 1, "one tensor of the first batch is still held"
    assert (labels == 1).all()
    del labels
    fourth = sent(outbox, 4)
    assert not fourth.new
    assert fourth.contents[0][0] == parcels[0].contents[0][0]
    assert (two.labels == 2).all()
    assert (inbox.open(fourth)[0].sizes == 4).all()
    assert (inbox.open(third)[0].images == 3).all()


def test_a_block_that_is_too_small_makes_room_for_a_larger_one():
    outbox, inbox = Outbox(), Inbox()
    first = sent(outbox, 1)
    inbox.open(first)
    larger = sent(outbox, 2, images=CAPACITY_STEP // 105 + 1)
    assert larger.gone == (first.contents[0][0],)
    [batch] = inbox.open(larger)
    del inbox, outbox
    assert (batch.images == 2).all(), "a batch outlives both boxes"
