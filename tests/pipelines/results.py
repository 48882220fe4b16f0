"""Detections from ground truth, shifted, dropped and added, so that scores are in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from tests.pipelines.tiny_coco import rle_of


def noisy_results(coco: dict[str, Any], kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """COCO results of one kind with tied scores among them."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    categories = [category["id"] for category in coco["categories"]]
    results = []
    for annotation in coco["annotations"]:
        if rng.random() < 0.2 or (kind == "keypoints" and not annotation.get("num_keypoints")):
            continue
        for _ in range(int(rng.integers(1, 3))):
            category = (
                annotation["category_id"] if rng.random() < 0.9 else int(rng.choice(categories))
            )
            score = float(np.round(rng.random(), 2))
            result = {"image_id": annotation["image_id"], "category_id": category, "score": score}
            results.append(result | _shifted(annotation, kind, sizes[annotation["image_id"]], rng))
    return results


def _shifted(
    annotation: dict[str, Any], kind: str, size: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    if kind == "bbox":
        dx, dy = rng.normal(0, 0.08, 2) * (w, h)
        return {"bbox": [x + float(dx), y + float(dy), w * 1.05, h]}
    if kind == "segm":
        mask = rle_tools.decode(rle_of(annotation["segmentation"], *size))
        rle = rle_tools.encode(
            np.asfortranarray(np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1)))
        )
        return {"segmentation": {"size": list(size), "counts": rle["counts"].decode()}}
    points = np.array(annotation["keypoints"], float).reshape(-1, 3)
    points[:, :2] += rng.normal(0, 0.02 * np.sqrt(w * h + 1), (len(points), 2))
    return {"keypoints": points.ravel().tolist()}
