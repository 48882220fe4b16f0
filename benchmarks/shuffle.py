"""How good is a shuffle within a window of shards, beside a full shuffle of all images?

    python benchmarks/shuffle.py --json

There are 118,287 images in 290 shards, as in train2017 at 64 MiB a shard. Both orders pass through
the same aspect-ratio blocks. The `labels` figures are of the worst case, a file that is sorted by
one of 80 labels. They say how far the labels of a batch, and of 256 batches in a row, are from
those of the whole file, as total variation; 0 is perfect. `ratio` is that of a batch, full over
windowed: 1 is as good as a full shuffle.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import numpy as np

from pipelines.load.order import Order
from pipelines.shards.index import Ints, Selection

NUM_IMAGES, SHARDS, LABELS, BATCH, WINDOW, BLOCK, RUN = 118_287, 290, 80, 16, 16, 32, 256


class SimulatedIndex:
    """The part of an index that `Order` calls. The images have COCO's most frequent sizes."""

    def __init__(self) -> None:
        self.starts = np.linspace(0, NUM_IMAGES, SHARDS + 1).astype(np.int64)
        self.num_shards = SHARDS
        rng = np.random.default_rng(0)
        self.width = rng.choice([640, 640, 480, 500], NUM_IMAGES)
        self.height = np.where(self.width == 640, rng.choice([480, 427, 425], NUM_IMAGES), 640)

    def selected(self, shard: int, _: Selection) -> Ints:
        return np.arange(self.starts[shard], self.starts[shard + 1])

    def counts(self, _: Selection) -> Ints:
        return np.diff(self.starts)

    def values(self, name: str, rows: Ints) -> Ints:
        return np.asarray(getattr(self, name)[rows])


def batches(index: Any, seed: int, epoch: int, window: int) -> Ints:
    """All whole global batches of an epoch: (batches, BATCH) rows."""
    order = Order(
        index,
        Selection((0,)),
        seed=seed,
        global_batch=BATCH,
        window_shards=window,
        block_batches=BLOCK,
    )
    first = epoch * order.steps_per_epoch
    return np.stack([order.rows(first + step) for step in range(order.steps_per_epoch - 1)])


def measures(index: Any, seed: int, window: int) -> dict[str, float]:
    one, two = (batches(index, seed, epoch, window) for epoch in (0, 1))
    shard = np.searchsorted(index.starts, one, side="right") - 1
    label = one * LABELS // NUM_IMAGES
    position = np.empty(NUM_IMAGES)
    position[one.ravel()] = np.arange(one.size)
    there = np.sort(one.ravel())
    again = np.full(NUM_IMAGES, -1)
    again[two.ravel()] = np.repeat(np.arange(len(two)), BATCH)
    met = again[one]
    return {
        "shards_in_a_batch": float(np.mean([len(set(row)) for row in shard])),
        "pairs_of_one_shard_in_a_batch": float(np.mean([pairs(row) for row in shard])),
        "pairs_that_meet_again_next_epoch": float(np.mean([pairs(row[row >= 0]) for row in met])),
        "displacement": float(np.abs(position[there] - there).mean() / NUM_IMAGES),
        "order_kept": float(np.corrcoef(position[there], there)[0, 1]),
        "labels_of_a_batch": variation(label),
        "labels_of_256_batches": variation(
            label[: len(label) // RUN * RUN].reshape(-1, RUN * BATCH)
        ),
    }


def pairs(values: Ints) -> int:
    """How many pairs are equal."""
    _, counts = np.unique(values, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def variation(labels: Ints) -> float:
    """Mean total variation between each row's labels and the uniform distribution."""
    counts = np.stack([np.bincount(row, minlength=LABELS) for row in labels])
    return float(0.5 * np.abs(counts / labels.shape[1] - 1 / LABELS).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="seeds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    index = SimulatedIndex()
    runs = [
        (measures(index, seed, WINDOW), measures(index, seed, SHARDS)) for seed in range(args.pairs)
    ]
    table = {
        name: {
            "windowed": statistics.median(ours[name] for ours, _ in runs),
            "full": statistics.median(full[name] for _, full in runs),
        }
        for name in runs[0][0]
    }
    ours, peer = table["labels_of_a_batch"]["windowed"], table["labels_of_a_batch"]["full"]
    result = {
        "name": "shuffle-quality",
        "ours": ours,
        "peer": peer,
        "ratio": peer / ours,
        "unit": "total variation of a batch's labels, file sorted by label",
        "table": table,
        "window_images": NUM_IMAGES * WINDOW // SHARDS,
        "device": "cpu",
        "pairs": args.pairs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
