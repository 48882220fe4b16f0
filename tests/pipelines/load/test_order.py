"""The order is a pure function of (index, seed, step): properties over random datasets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.load.order import Order, chunks, rank_slice
from pipelines.shards import schema
from pipelines.shards.index import Index, Selection

SETTINGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "global_batch": st.integers(1, 12),
        "window_shards": st.integers(1, 5),
        "block_batches": st.integers(1, 5),
    }
)


def make_index(shard_rows: list[int], empty: set[int] = frozenset(), seed: int = 0) -> Index:
    """An index of shards with so many images each. Images in `empty` have no object."""
    rng = np.random.default_rng(seed)
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        with pa.ipc.new_file(str(path), schema.INDEX) as writer:
            for count in shard_rows:
                rows = []
                for _ in range(count):
                    objects = 0 if number in empty else 1
                    rows.append(
                        {
                            "image_id": 1000 + number,
                            "width": int(rng.integers(20, 60)),
                            "height": int(rng.integers(20, 60)),
                            "crc32": 0,
                            "ann_label": [0] * objects,
                            "ann_area": [9.0] * objects,
                            "ann_flags": [schema.HAS_BOX] * objects,
                        }
                    )
                    number += 1
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema.INDEX))
        return Index(path)


SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)
ALL = Selection((0,))


@given(SHARDS, SETTINGS, st.integers(0, 3))
def test_an_epoch_is_a_permutation_and_fills_up_from_its_start(shard_rows, settings, epoch):
    order = Order(make_index(shard_rows), ALL, **settings)
    total, batch = sum(shard_rows), settings["global_batch"]
    assert order.steps_per_epoch == -(-total // batch)
    sequence = order.sequence(epoch, 0, order.steps_per_epoch * batch)
    assert sorted(sequence[:total]) == list(range(total))
    np.testing.assert_array_equal(
        sequence[total:], np.resize(sequence[:total], len(sequence) - total)
    )
    first = epoch * order.steps_per_epoch
    batches = [order.rows(step) for step in range(first, first + order.steps_per_epoch)]
    assert all(len(rows) == batch for rows in batches)
    assert sorted(np.concatenate(batches)) == sorted(sequence)


@given(SHARDS, SETTINGS, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_any_step_can_be_asked_for_first(shard_rows, settings, steps):
    index = make_index(shard_rows)
    in_order = Order(index, ALL, **settings)
    expected = {step: in_order.rows(step).tolist() for step in range(max(steps) + 1)}
    jumping = Order(index, ALL, **settings)
    assert {step: jumping.rows(step).tolist() for step in steps} == {
        step: expected[step] for step in steps
    }
    assert Order(index, ALL, **settings).rows(steps[0]).tolist() == expected[steps[0]]


@given(SETTINGS)
def test_epochs_and_seeds_differ(settings):
    index = make_index([9] * 6)
    order = Order(index, ALL, **settings)
    other = Order(index, ALL, **(settings | {"seed": settings["seed"] + 1}))
    first = order.sequence(0, 0, 54)
    assert not np.array_equal(first, order.sequence(1, 0, 54))
    assert not np.array_equal(first, other.sequence(0, 0, 54))


@given(SHARDS, SETTINGS)
def test_an_image_stays_within_its_window_of_shards(shard_rows, settings):
    index = make_index(shard_rows)
    order = Order(index, ALL, **settings)
    sequence = order.sequence(0, 0, sum(shard_rows))
    shards = np.searchsorted(index.starts, sequence, side="right") - 1
    permuted = list(order._epoch_shards(0)[0])
    windows = [permuted.index(s) // settings["window_shards"] for s in shards]
    assert windows == sorted(windows)


@given(SHARDS, SETTINGS, st.data())
def test_images_without_objects_are_left_out(shard_rows, settings, data):
    total = sum(shard_rows)
    empty = data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1))
    order = Order(make_index(shard_rows, empty), Selection((0,), drop_empty=True), **settings)
    assert order.num_images == total - len(empty)
    drawn = {int(row) for step in range(order.steps_per_epoch) for row in order.rows(step)}
    assert drawn == set(range(total)) - empty


def test_a_block_is_sorted_by_aspect_ratio():
    index = make_index([50] * 4)
    rows = Order(index, ALL, seed=0, global_batch=10, window_shards=2, block_batches=5)

    def spread(picked: np.ndarray) -> np.floating:
        return np.ptp(np.log(index.values("width", picked) / index.values("height", picked)))

    sorted_spread = np.mean([spread(rows.rows(step)) for step in range(20)])
    plain = rows.sequence(0, 0, 200).reshape(20, 10)
    assert sorted_spread < 0.4 * np.mean([spread(picked) for picked in plain])


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match=r"no image .* has a usable object .0 of 0 objects"):
        Order(
            make_index([3], {0, 1, 2}),
            Selection((0,), drop_empty=True),
            seed=0,
            global_batch=2,
            window_shards=1,
            block_batches=1,
        )


@settings(max_examples=200)
@given(st.integers(1, 70), st.integers(1, 70))
def test_ranks_and_chunks_partition_the_batch(count, parts):
    if parts <= count:
        pieces = [list(range(count))[rank_slice(count, rank, parts)] for rank in range(parts)]
        assert [k for piece in pieces for k in piece] == list(range(count))
        assert {len(piece) for piece in pieces} <= {count // parts, -(-count // parts)}
    cut = chunks(count, parts)
    assert [k for piece in cut for k in range(count)[piece]] == list(range(count))
    assert max(piece.stop - piece.start for piece in cut) <= parts
    assert len(cut) == -(-count // parts)


@given(st.floats(0.05, 0.95), st.integers(0, 5))
def test_the_holdout_parts_the_images_whatever_else_is_there(fraction, extra):
    ids = np.arange(1, 2001, dtype=np.int64)
    held = Selection((0,), holdout=fraction, part="holdout").drawn(ids)
    kept = Selection((0,), holdout=fraction, part="train").drawn(ids)
    np.testing.assert_array_equal(held, ~kept)
    assert abs(held.mean() - fraction) < 0.06
    np.testing.assert_array_equal(
        Selection((0,), holdout=fraction, part="train").drawn(ids[extra:]), kept[extra:]
    )
