"""`pipelines.evaluation.evaluate` beside plain pycocotools on 5,000 images x 100 detections: time, and peak memory.

    python benchmarks/evaluation.py --images 5000 --json

Each measurement runs in a process of its own, so that peaks are its own. Runs alternate; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation import evaluate, read_results


def write_case(folder: Path, num_images: int, detections: int) -> None:
    """Seven objects an image over 80 categories, and detections around them, as in val2017."""
    rng = np.random.default_rng(0)
    images = [{"id": k + 1, "width": 640, "height": 480, "file_name": f"{k}.jpg"} for k in range(num_images)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        boxes = np.concatenate([rng.uniform(0, 400, (7, 2)), rng.uniform(8, 200, (7, 2))], 1).round(2)
        labels = rng.integers(1, 81, 7)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            record = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": label, "iscrowd": 0}
            annotations.append(record | {"bbox": box, "area": box[2] * box[3]})
        near = rng.integers(0, 7, detections)
        moved = (boxes[near] + rng.normal(0, 6, (detections, 4))).clip(1).round(2)
        named = np.where(rng.random(detections) < 0.7, labels[near], rng.integers(1, 81, detections))
        for box, label, score in zip(moved.tolist(), named.tolist(), rng.random(detections).tolist(), strict=True):
            results.append({"image_id": image["id"], "category_id": label, "bbox": box, "score": score})
    categories = [{"id": k, "name": f"c{k}"} for k in range(1, 81)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "gt.json").write_text(json.dumps(coco))
    (folder / "dt.json").write_text(json.dumps(results))


def ours(folder: Path) -> list[float]:
    return list(evaluate(folder / "gt.json", read_results(folder / "dt.json"), "bbox").stats.values())


def plain(folder: Path) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "gt.json"))
        run = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]


def measured(which: str, folder: Path, queue: Any) -> None:
    started = time.perf_counter()
    stats = {"ours": ours, "peer": plain}[which](folder)
    seconds = time.perf_counter() - started
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, stats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as name:
        folder = Path(name)
        write_case(folder, args.images, args.detections)
        runs: dict[str, list[tuple[float, float, list[float]]]] = {"ours": [], "peer": []}
        for which in ("ours", "peer") * args.pairs:
            queue = context.Queue()
            process = context.Process(target=measured, args=(which, folder, queue))
            process.start()
            runs[which].append(queue.get())
            process.join()
    (time_ours, mib_ours), (time_peer, mib_peer) = (
        (statistics.median(r[0] for r in found), statistics.median(r[1] for r in found)) for found in runs.values()
    )
    result = {
        "name": "evaluation-vs-pycocotools",
        "ours": time_ours,
        "peer": time_peer,
        "ratio": time_peer / time_ours,
        "unit": "s",
        "peak_mib": mib_ours,
        "peer_peak_mib": mib_peer,
        "equal_stats": runs["ours"][0][2] == runs["peer"][0][2],
        "device": "cpu",
        "pairs": args.pairs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
