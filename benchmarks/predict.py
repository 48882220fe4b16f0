"""Inference beside torchvision's with the same weights, masks pasted and RLE-encoded included.

    python benchmarks/predict.py --side 512

Both read the same noise image; ours is `detector.predict` with `paste_mask` crops, torchvision's its own forward and
full-size masks. The ratio is of the medians of images per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.build import build_detector
from model.config import preset
from model.paste import paste_mask
from model.structures import Batch
from model.weights import from_torchvision


def one_image(image: Tensor) -> Batch:
    size = torch.tensor([list(image.shape[1:])])
    return Batch(
        images=image[None],
        sizes=size,
        original_sizes=size,
        sample_ids=torch.zeros(1, dtype=torch.int64),
        noise_keys=torch.zeros(1, dtype=torch.int64),
        boxes_xyxy=torch.zeros(1, 0, 4),
        labels=torch.zeros(1, 0, dtype=torch.int64),
        valid=torch.zeros(1, 0, dtype=torch.bool),
        mask_crops=torch.zeros(1, 0, 0, 0, dtype=torch.uint8),
        keypoints=torch.zeros(1, 0, 0, 3),
        proposals_xyxy=torch.zeros(1, 0, 4),
    )


def encode(mask: Tensor, top: int, left: int, height: int, width: int) -> dict[str, object]:
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask.cpu().numpy()
    return rle_tools.encode(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    peer = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, min_size=args.side, max_size=args.side
    )
    peer = peer.eval().to(device)
    cfg = preset("r50-fpn-torchvision")
    inference = cfg.inference.model_copy(update={"score_threshold": 0.0})
    detector = build_detector(cfg.model_copy(update={"inference": inference}))
    detector.load_state_dict(from_torchvision(peer.state_dict()), strict=True)
    detector.to(device).eval()
    image = torch.randint(0, 256, (3, args.side, args.side), dtype=torch.uint8, device=device)
    batch = one_image(image.cpu()).to(device)

    def ours() -> int:
        found = detector.predict(batch)
        kept = found.valid[0]
        masks, boxes = next(iter(found.masks.values()))[0, kept], found.boxes_xyxy[0, kept]
        crops = [paste_mask(m, b, args.side, args.side) for m, b in zip(masks, boxes, strict=True)]
        return len([encode(crop, top, left, args.side, args.side) for crop, top, left in crops])

    def theirs() -> int:
        with torch.no_grad():
            found = peer([image.float() / 255])[0]
        masks = (found["masks"][:, 0] >= 0.5).to(torch.uint8)
        return len([encode(mask, 0, 0, args.side, args.side) for mask in masks])

    assert ours() == theirs()
    seconds = measure({"ours": ours, "peer": theirs}, args.pairs)
    rate = {name: 1 / value for name, value in seconds.items()}
    result = {
        "name": f"predict r50-fpn {args.side} px, 100 masks pasted and encoded, images/s",
        "ours": round(rate["ours"], 3),
        "peer": round(rate["peer"], 3),
        "ratio": round(rate["ours"] / rate["peer"], 3),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "pairs": args.pairs,
    }
    if not args.json:
        print(f"{result['name']}: ours {result['ours']}, torchvision {result['peer']}, ratio {result['ratio']}")
    print(json.dumps(result))


def measure(calls: dict[str, Callable[[], int]], pairs: int) -> dict[str, float]:
    """Median seconds of each, in turns; every call ends on the host."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
