"""Seconds from opening a local dataset of 1,000 shards to its first batch.

    python benchmarks/first_batch.py --json

`ours` is the time to the last batch of an epoch, `peer` the time to the first one. A ratio near 1
says that a resume costs the same anywhere. There are no loader workers; `start_s` of loader.py is
their start. Each run opens the dataset anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from contract.data import DataConfig
from pipelines.load.loader import TrainLoader
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from pipelines.shards.dataset import open_dataset


def many_shards(folder: Path, count: int) -> Path:
    """A dataset of `count` shards of one small image each."""
    synthesise(folder / "synth", num_images=10, size=64, seed=0)
    coco = json.loads((folder / "synth/annotations/instances_train.json").read_text())
    first, names = coco["images"][0], [image["file_name"] for image in coco["images"]]
    objects = [a for a in coco["annotations"] if a["image_id"] == first["id"]]
    coco["images"] = [first | {"id": k + 1, "file_name": names[0]} for k in range(count)]
    coco["annotations"] = [
        a | {"id": k * len(objects) + n + 1, "image_id": k + 1}
        for k in range(count)
        for n, a in enumerate(objects)
    ]
    (folder / "many.json").write_text(json.dumps(coco))
    pack(
        [folder / "many.json"],
        str(folder / "synth/images/train"),
        str(folder / "packed"),
        PackOptions(shard_mib=1e-6),
    )
    return folder / "packed"


def seconds_to_batch(packed: Path, last: bool) -> float:
    cfg = DataConfig(train=str(packed), val="none", short_sides_px=(64,), num_loader_workers=0)
    started = time.perf_counter()
    dataset = open_dataset(str(packed))
    step = dataset.manifest.num_images // 8 - 1 if last else 0
    stream = TrainLoader(
        cfg,
        dataset,
        seed=0,
        global_batch=8,
        rank=0,
        world_size=1,
        max_images_per_forward=8,
        start_step=step,
        masks=True,
    )
    next(iter(stream))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as name:
        packed = many_shards(Path(name), args.shards)
        seconds_to_batch(packed, last=False)
        pairs = [
            (seconds_to_batch(packed, last=True), seconds_to_batch(packed, last=False))
            for _ in range(args.pairs)
        ]
    result = {
        "name": "first-batch",
        "ours": statistics.median(end for end, _ in pairs),
        "peer": statistics.median(start for _, start in pairs),
        "ratio": statistics.median(start / end for end, start in pairs),
        "unit": "s",
        "shards": args.shards,
        "device": "cpu",
        "pairs": args.pairs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
