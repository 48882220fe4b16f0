"""Memory of the loader's workers over an epoch, and of packing, with as many records as train2017.

    python benchmarks/loader_memory.py --json

118,287 images and 860,001 annotations are simulated: every image is the same small JPEG, every
annotation has its own polygon. Memory is private memory (USS: what the end of the process frees).

- `ours` is what the largest worker holds above an empty worker (the same process and imports,
  nothing loaded), at most over the epoch. `peer` is the same in the first tenth of the epoch. A
  ratio near 1 says that memory stays flat.
- `in_flight_mib` is the most that the blocks of the batches in flight add. They are not in `ours`:
  their size follows from the canvas and the prefetching, not from the dataset.
- `pack_mib` is the peak of all packing processes, `pack_tenth_mib` the same with a tenth of the
  records.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loader import opened
from model.structures import Batch
from pipelines.load.loader import _Stream

NUM_IMAGES, NUM_ANNOTATIONS, SIDE, POINTS, CATEGORIES = 118_287, 860_001, 32, 20, 80
SHARDS = 290  # as many as train2017 has at 64 MiB
BATCH = 16


def simulate(folder: Path, num_images: int, num_annotations: int) -> Path:
    """Writes images/one.jpg, and the annotation file piece by piece. Returns that file."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / "images/one.jpg")
    path = folder / "simulated.json"
    with path.open("w") as file:
        file.write('{"images": [')
        for number in range(1, num_images + 1):
            image = {"id": number, "file_name": "one.jpg", "width": SIDE, "height": SIDE}
            file.write(json.dumps(image) + ("," if number < num_images else "], "))
        categories = [{"id": k, "name": f"c{k}"} for k in range(1, CATEGORIES + 1)]
        file.write(f'"categories": {json.dumps(categories)}, "annotations": [')
        owners = rng.integers(1, num_images + 1, num_annotations)
        for number, owner in enumerate(owners.tolist(), 1):
            file.write(
                json.dumps(annotation(rng, number, owner))
                + ("," if number < num_annotations else "]}")
            )
    return path


def annotation(rng: np.random.Generator, number: int, owner: int) -> dict[str, Any]:
    points = rng.integers(0, 100 * SIDE, (POINTS, 2)) / 100
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return {
        "id": number,
        "image_id": owner,
        "category_id": number % CATEGORIES + 1,
        "iscrowd": 0,
        "area": float((x1 - x0) * (y1 - y0) / 2),
        "bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)],
        "segmentation": [points.ravel().tolist()],
    }


def private_mib(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss / 2**20)


def pack_in_processes(
    folder: Path, annotations: Path, workers: int, shard_mib: float
) -> tuple[float, float]:
    """Runs `data pack`. Returns its seconds, and the peak of its private memory in MiB."""
    options = {
        "annotations": annotations,
        "images": folder / "images",
        "out": folder / "packed",
        "workers": workers,
        "shard-mib": f"{shard_mib:.4f}",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    started, peak = time.perf_counter(), 0.0
    command = psutil.Popen(
        [sys.executable, "-m", "pipelines", "data", "pack", *words, "--json"], stdout=PIPE
    )
    while command.poll() is None:
        total = 0.0
        for process in (command, *command.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += private_mib(process)
        peak = max(peak, total)
        time.sleep(0.1)
    if command.returncode:
        raise RuntimeError(f"packing ended with {command.returncode}")
    return time.perf_counter() - started, peak


def worker_mib(iterator: Any) -> tuple[float, float]:
    """Private memory of the largest worker without its blocks of batches, and of those blocks."""
    workers = []
    for worker in iterator._workers:
        process = psutil.Process(worker.pid)
        maps = [entry for entry in process.memory_maps() if "maskray-batch" in entry.path]
        blocks = sum(entry.private_clean + entry.private_dirty for entry in maps) / 2**20
        workers.append((private_mib(process) - blocks, blocks))
    return max(workers)


class EmptySource:
    """A source whose workers load nothing."""

    def load(self, *_: Any) -> list[Batch]:
        return []

    def finish(self, number: int, _: list[Batch]) -> int:
        return number


def empty_worker_mib() -> float:
    stream: _Stream[int] = _Stream(EmptySource(), 1)
    numbers = stream.iterate(range(3))
    next(numbers)
    private, _ = worker_mib(stream._running[0])
    stream.close()
    return private


def epoch(packed: Path, workers: int) -> tuple[list[float], float, float]:
    """Runs an epoch. Returns the largest worker's private memory at 20 moments, in MiB,
    the most that its blocks held, and images/s.
    """
    stream = opened(packed, workers, SIDE, SIDE * 2, BATCH)
    last, over_epoch, in_flight_mib = stream.steps_per_epoch - 1, [], 0.0
    started = time.perf_counter()
    for step in stream:
        if step.step % max(1, last // 20) == 0:
            private, blocks = worker_mib(stream._stream._running[0])
            over_epoch.append(private)
            in_flight_mib = max(in_flight_mib, blocks)
        if step.step == last:
            break
    seconds = time.perf_counter() - started
    stream.close()
    return over_epoch, in_flight_mib, (last + 1) * BATCH / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="part of train2017's records")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peaks, seconds = [], 0.0
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as name:
        for scale in (args.scale / 10, args.scale):
            folder = Path(name) / str(scale)
            annotations = simulate(folder, int(NUM_IMAGES * scale), int(NUM_ANNOTATIONS * scale))
            jpeg = (folder / "images/one.jpg").stat().st_size
            shard_mib = max(0.01, NUM_IMAGES * jpeg / SHARDS / 2**20)
            seconds, peak = pack_in_processes(folder, annotations, args.workers, shard_mib)
            peaks.append(peak)
            size = annotations.stat().st_size / 2**20
            if not args.json:
                images = int(NUM_IMAGES * scale)
                print(f"packed {images} images in {seconds:.0f} s, peak {peak:.0f} MiB", flush=True)
        empty = empty_worker_mib()
        over_epoch, in_flight_mib, rate = epoch(folder / "packed", args.workers)
    tenth = max(over_epoch[: max(1, len(over_epoch) // 10)])
    result = {
        "name": "loader-memory",
        "ours": max(over_epoch) - empty,
        "peer": tenth - empty,
        "ratio": (tenth - empty) / (max(over_epoch) - empty),
        "unit": "MiB private (USS) above an empty worker",
        "empty_worker_mib": empty,
        "over_the_epoch_mib": [round(value - empty, 1) for value in over_epoch],
        "in_flight_mib": in_flight_mib,
        "images_per_s": rate,
        "pack_mib": peaks[1],
        "pack_tenth_mib": peaks[0],
        "pack_seconds": seconds,
        "annotation_file_mib": size,
        "images": int(NUM_IMAGES * args.scale),
        "annotations": int(NUM_ANNOTATIONS * args.scale),
        "device": f"cpu, {args.workers} workers",
        "pairs": 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
