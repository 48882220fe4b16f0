"""Images/s of our training batches, beside another pipeline on the same images.

    python benchmarks/loader.py --peer torchvision     # the aim: at least 5 times as many images/s
    python benchmarks/loader.py --peer bare            # the aim: at least 0.6
    python benchmarks/loader.py --peer litdata --repeat 30 --images 2000

The peers:
- `torchvision`: `CocoDetection`, v2 transforms and `DataLoader`, torchvision's own pipeline.
- `bare`: decode, resize and pad alone, on the same cores. No loader can be faster. It runs one
  process a worker on images in memory, and delivers to nobody.
- `litdata`: stored bytes and annotations without decoding, in one process. litdata is no dependency
  (pip install litdata). It starts threads anew for each epoch; `--repeat` keeps it in the first.

The images are real COCO images, repeated (`--data`, a folder like coco-mini; synthetic ones without
it): short side 800, flip, masks. The time to the first batch is reported apart, and batches that
were prefetched meanwhile are not counted. Runs alternate; the figures are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from contract.data import DataConfig
from pipelines.load.collate import round_up
from pipelines.load.images import decode, resize, resized_size
from pipelines.load.loader import TrainLoader
from pipelines.load.order import Order
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from pipelines.shards.dataset import Dataset, open_dataset

SHORT, LONGEST, MULTIPLE, BATCH = 800, 1333, 32, 8


class Timed(NamedTuple):
    """One run. CPU time is that of all its processes; other programs hardly change it."""

    images_per_s: float  # after start-up
    start_s: float  # until the first batch
    cpu_ms: float  # per image, after start-up


def source_files(data: str, folder: Path, repeat: int) -> tuple[Path, Path]:
    """Writes annotations that list every image `repeat` times under new ids. The image folder."""
    if data:
        annotations, images = (
            Path(data) / "annotations/instances_train2017.json",
            Path(data) / "train2017",
        )
    else:
        synthesise(folder / "synth", num_images=100, size=640, seed=0)
        annotations, images = (
            folder / "synth/annotations/instances_train.json",
            folder / "synth/images/train",
        )
    coco = json.loads(annotations.read_text())
    step = 1 + max(record["id"] for key in ("images", "annotations") for record in coco[key])
    many = dict(coco, images=[], annotations=[])
    for turn in range(repeat):
        many["images"] += [image | {"id": image["id"] + turn * step} for image in coco["images"]]
        many["annotations"] += [
            a | {"id": a["id"] + turn * step, "image_id": a["image_id"] + turn * step}
            for a in coco["annotations"]
        ]
    path = folder / "repeated.json"
    path.write_text(json.dumps(many))
    return path, images


def timed(batches: Iterator[int], num_images: int, warm_up: int = 1) -> Timed:
    """Takes batch sizes until `num_images` have come.

    The first `warm_up` batches do not count: the workers prefetched them during the start.
    """
    started = time.perf_counter()
    next(batches)
    start_up = time.perf_counter() - started
    for _ in range(warm_up - 1):
        next(batches)
    first, cpu = time.perf_counter(), cpu_seconds()
    seen = 0
    for count in batches:
        seen += count
        if seen >= num_images:
            break
    return Timed(seen / (time.perf_counter() - first), start_up, (cpu_seconds() - cpu) / seen * 1e3)


def cpu_seconds() -> float:
    """Of this process and its descendants, ended ones included."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (me, *me.children(recursive=True)))


def opened(packed: Path, workers: int, short: int, longest: int, batch: int) -> TrainLoader:
    """Training batches with masks, of a whole dataset on one rank."""
    cfg = DataConfig(
        train=str(packed),
        val="none",
        short_sides_px=(short,),
        max_side_px=longest,
        num_loader_workers=workers,
    )
    return TrainLoader(
        cfg,
        open_dataset(str(packed)),
        seed=0,
        global_batch=batch,
        rank=0,
        world_size=1,
        max_images_per_forward=batch,
        masks=True,
    )


def ours(packed: Path, workers: int, num_images: int) -> Timed:
    stream = opened(packed, workers, SHORT, LONGEST, BATCH)
    try:
        return timed(
            (sum(len(batch) for batch in step.batches) for step in stream), num_images, 4 * workers
        )
    finally:
        stream.close()


def torchvision_peer(annotations: Path, images: Path, workers: int, num_images: int) -> Timed:
    """torchvision's own pipeline: CocoDetection with masks, v2 transforms, DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(SHORT, max_size=LONGEST, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[1].get("labels")),
        ]
    )
    dataset = wrap_dataset_for_transforms_v2(
        CocoDetection(str(images), str(annotations), transforms=transforms),
        target_keys=("boxes", "labels", "masks"),
    )
    dataset = torch.utils.data.Subset(
        dataset, [k for k, i in enumerate(dataset.ids) if dataset.coco.getAnnIds(i)]
    )
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=pad_together,
        multiprocessing_context="fork",
        worker_init_fn=one_thread,
    )
    stream = (len(batch[1]) for _ in itertools.count() for batch in loader)
    return timed(stream, num_images, 4 * workers)


def pad_together(samples: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    """Images on one canvas; targets stay a list, as torchvision's models take them."""
    height, width = (round_up(max(s[0].shape[side] for s in samples), MULTIPLE) for side in (1, 2))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    for canvas, (image, _) in zip(images, samples, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return images, [target for _, target in samples]


def one_thread(_: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def bare_peer(packed: Path, workers: int, num_images: int) -> Timed:
    """Each core decodes, resizes and pads images in memory. It delivers to nobody."""
    context = multiprocessing.get_context("spawn")
    queue, gate = context.Queue(), context.Barrier(workers)
    share = num_images // workers
    processes = [
        context.Process(target=bare_worker, args=(packed, k, share, gate, queue))
        for k in range(workers)
    ]
    started = time.perf_counter()
    for process in processes:
        process.start()
    reports = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    seconds, cpu = (list(values) for values in zip(*reports, strict=True))
    start_up = time.perf_counter() - started - max(seconds)
    return Timed(workers * share / max(seconds), start_up, sum(cpu) / (workers * share) * 1e3)


def bare_worker(packed: Path, number: int, count: int, gate: Any, queue: Any) -> None:
    one_thread(0)
    dataset = open_dataset(str(packed))
    rows = [dataset.row(row) for row in dataset.rows()[number * 40 : number * 40 + 40]]
    contents = [(bytes(row.content), row.height, row.width) for row in rows]
    gate.wait()
    started, cpu = time.perf_counter(), time.process_time()
    for content, height, width in itertools.islice(itertools.cycle(contents), count):
        size = resized_size(height, width, SHORT, LONGEST)
        image = resize(decode(content, 1), *size)
        canvas = torch.empty(
            round_up(size[0], MULTIPLE), round_up(size[1], MULTIPLE), 3, dtype=torch.uint8
        )
        canvas.permute(2, 0, 1)[:, : size[0], : size[1]] = image
    queue.put((time.perf_counter() - started, time.process_time() - cpu))


# --- stored bytes and annotations ---------------------------------------------------------------


def raw_item(dataset: Dataset, number: int) -> dict[str, Any]:
    """The bytes of the image file, and its objects that train: boxes, labels, polygons.

    points: of all polygons, in a row. ends: where each polygon ends.
    """
    row = dataset.row(number)
    chosen, labels = dataset.index.usable_objects(number, dataset.selection)
    polygons = [row.annotations.polygons(k) for k in chosen]
    return {
        "image": bytes(row.content),
        "boxes": row.annotations.boxes_xywh[chosen],
        "labels": labels,
        "points": np.concatenate([points for points, _ in polygons] or [np.zeros((0, 2))]),
        "ends": np.array([end for _, ends in polygons for end in ends], np.int64),
    }


def raw_ours(packed: Path, num_images: int) -> Timed:
    """Reads items in training order, in this process."""

    def items() -> Iterator[int]:
        dataset = open_dataset(str(packed))
        order = Order(
            dataset.index,
            dataset.selection,
            seed=0,
            global_batch=BATCH,
            window_shards=16,
            block_batches=32,
        )
        for step in itertools.count():
            for number in order.rows(step):
                assert raw_item(dataset, int(number))["image"]
                yield 1

    return timed(items(), num_images)


def write_litdata(packed: Path, folder: Path) -> None:
    from litdata import optimize

    numbers = open_dataset(str(packed)).rows()
    optimize(
        fn=partial(litdata_item, str(packed)),
        inputs=numbers,
        output_dir=str(folder),
        num_workers=1,
        chunk_bytes="64MB",
    )


def litdata_item(packed: str, number: int) -> dict[str, Any]:
    return raw_item(open_dataset(packed), number)


def raw_litdata(folder: Path, num_images: int) -> Timed:
    """Reads the same items with litdata's own reader, shuffled, in this process."""
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    return timed((1 for _ in itertools.count() for item in dataset if item["image"]), num_images)


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=("torchvision", "bare", "litdata"), default="torchvision")
    parser.add_argument("--data", default=os.environ.get("MASKRAY_COCO_MINI", ""))
    parser.add_argument("--images", type=int, default=480, help="images timed in one run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=4, help="times that the images are repeated")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.peer == "litdata" and find_spec("litdata") is None:
        sys.exit(
            "litdata is not installed, so there is no peer; install it with: pip install litdata"
        )
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as name:
        folder = Path(name)
        annotations, images = source_files(args.data, folder, args.repeat)
        packed = folder / "packed"
        pack([annotations], str(images), str(packed), PackOptions(shard_mib=8))
        run_ours: Callable[[], Timed] = partial(ours, packed, args.workers, args.images)
        match args.peer:
            case "torchvision":
                run_peer: Callable[[], Timed] = partial(
                    torchvision_peer, annotations, images, args.workers, args.images
                )
            case "bare":
                run_peer = partial(bare_peer, packed, args.workers, args.images)
            case _:
                write_litdata(packed, folder / "litdata")
                run_ours = partial(raw_ours, packed, args.images)
                run_peer = partial(raw_litdata, folder / "litdata", args.images)
        pairs = []
        for number in range(args.pairs):
            pairs.append((run_ours(), run_peer()))
            if not args.json:
                for who, run in zip(("ours", "peer"), pairs[-1], strict=True):
                    print(
                        f"{number + 1} {who}: "
                        + ", ".join(f"{k} {v:.2f}" for k, v in run._asdict().items())
                    )
    result = {
        "name": f"loader-vs-{args.peer}",
        "ours": statistics.median(us.images_per_s for us, _ in pairs),
        "peer": statistics.median(them.images_per_s for _, them in pairs),
        "ratio": statistics.median(us.images_per_s / them.images_per_s for us, them in pairs),
        "unit": "images/s",
        "start_s": statistics.median(us.start_s for us, _ in pairs),
        "peer_start_s": statistics.median(them.start_s for _, them in pairs),
        "cpu_ms": statistics.median(us.cpu_ms for us, _ in pairs),
        "peer_cpu_ms": statistics.median(them.cpu_ms for _, them in pairs),
        "cpu_ratio": statistics.median(them.cpu_ms / us.cpu_ms for us, them in pairs),
        "device": f"cpu, {args.workers} workers",
        "images": "coco" if args.data else "synthetic",
        "pairs": len(pairs),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
