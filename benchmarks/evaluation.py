"""Time and peak memory of our COCO evaluation, beside plain pycocotools.

    python benchmarks/evaluation.py --iou bbox --json
    python benchmarks/evaluation.py --iou segm --pairs 1 --json

Both evaluate the same 5,000 images x 100 detections. Ours is `evaluate`, which takes hotcoco if it
is installed (`pip install 'maskray[fast]'`), otherwise pycocotools. Each measurement runs in its
own process, so that its peak is its own. Runs alternate; the figures are medians. `equal_stats`
says whether both gave the same statistics.
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
from pycocotools import mask as rle_tools

from pipelines.evaluate.engines import IouType, default_engine
from pipelines.evaluate.evaluation import evaluate, read_results


def write_case(folder: Path, num_images: int, detections: int, masks: bool) -> None:
    """Writes seven objects an image over 80 categories, as in val2017, and detections near them.

    Masks are ellipses.
    """
    rng = np.random.default_rng(0)
    images = [
        {"id": k + 1, "width": 640, "height": 480, "file_name": f"{k}.jpg"}
        for k in range(num_images)
    ]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in images:
        boxes = np.concatenate([rng.uniform(0, 400, (7, 2)), rng.uniform(8, 200, (7, 2))], 1).round(
            2
        )
        labels = rng.integers(1, 81, 7)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            record = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": label,
                "iscrowd": 0,
            }
            shape = {"segmentation": [ellipse(box)]} if masks else {}
            annotations.append(record | {"bbox": box, "area": box[2] * box[3]} | shape)
        near = rng.integers(0, 7, detections)
        moved = (boxes[near] + rng.normal(0, 6, (detections, 4))).clip(1).round(2)
        named = np.where(
            rng.random(detections) < 0.7, labels[near], rng.integers(1, 81, detections)
        )
        for box, label, score in zip(
            moved.tolist(), named.tolist(), rng.random(detections).tolist(), strict=True
        ):
            kind, value = ("segmentation", encoded(ellipse(box))) if masks else ("bbox", box)
            results.append(
                {"image_id": image["id"], "category_id": label, "score": score, kind: value}
            )
    categories = [{"id": k, "name": f"c{k}"} for k in range(1, 81)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "gt.json").write_text(json.dumps(coco))
    (folder / "dt.json").write_text(json.dumps(results))


def ellipse(box: list[float]) -> list[float]:
    x, y, w, h = box
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
    return [float(v) for v in points.clip(0, (640, 480)).round(1).ravel()]


def encoded(polygon: list[float]) -> dict[str, Any]:
    [rle] = rle_tools.frPyObjects([polygon], 480, 640)
    return {"size": [480, 640], "counts": rle["counts"].decode()}


def ours(folder: Path, iou: IouType) -> list[float]:
    return list(evaluate(folder / "gt.json", read_results(folder / "dt.json"), iou).stats.values())


def plain(folder: Path, iou: IouType) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "gt.json"))
        run = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), iou)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]


def measured(which: str, folder: Path, iou: IouType, queue: Any) -> None:
    started = time.perf_counter()
    stats = {"ours": ours, "peer": plain}[which](folder, iou)
    seconds = time.perf_counter() - started
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, stats))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iou", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="maskray-bench-") as name:
        folder = Path(name)
        write_case(folder, args.images, args.detections, args.iou == "segm")
        runs: dict[str, list[tuple[float, float, list[float]]]] = {"ours": [], "peer": []}
        for which in ("ours", "peer") * args.pairs:
            queue = context.Queue()
            process = context.Process(target=measured, args=(which, folder, args.iou, queue))
            process.start()
            runs[which].append(queue.get())
            process.join()
    (time_ours, mib_ours), (time_peer, mib_peer) = (
        (statistics.median(r[0] for r in side), statistics.median(r[1] for r in side))
        for side in runs.values()
    )
    result = {
        "name": f"evaluation-of-{args.iou}-vs-pycocotools",
        "engine": default_engine([]),
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
