"""Inference beside torchvision's with the same weights, masks pasted and RLE-encoded included.

    python benchmarks/predict.py --side 512

Both read the same noise image; ours is `detector.predict` with `paste_mask` crops as evaluation
does it, torchvision's its own forward and full-size masks. The ratio is of the medians of images
per second.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pairs import in_turns, report, seconds
from benchmarks.train_step import sharpen
from contract.presets import preset
from model.accelerate import accelerate
from model.branches.paste import paste_mask
from model.build import build_detector
from model.structures import Batch
from model.weights import from_torchvision
from pipelines.evaluate.evaluation import encode_crop


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, args.side, args.side), dtype=torch.uint8)
    peer = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=args.side, max_size=args.side
    ).eval()
    sharpen(peer, image)
    detector = build_detector(preset("r50-fpn-torchvision"))
    detector.load_state_dict(from_torchvision(peer.state_dict()), strict=True)
    accelerate(detector)
    detector, peer, image = detector.to(device).eval(), peer.to(device), image.to(device)
    batch = one_image(image.cpu()).to(device)

    def ours() -> int:
        found = detector.predict(batch)
        kept = found.valid[0]
        masks, boxes = next(iter(found.masks.values()))[0, kept], found.boxes_xyxy[0, kept]
        masks, boxes = masks.cpu(), boxes.cpu()
        crops = [paste_mask(m, b, args.side, args.side) for m, b in zip(masks, boxes, strict=True)]
        return len(
            [
                encode_crop(crop.numpy(), top, left, args.side, args.side)
                for crop, top, left in crops
            ]
        )

    def theirs() -> int:
        with torch.no_grad():
            found = peer([image.float() / 255])[0]
        masks = (found["masks"][:, 0] >= 0.5).to(torch.uint8).cpu().numpy()
        return len([rle_tools.encode(np.asfortranarray(mask)) for mask in masks])

    masks = {"ours": ours(), "peer": theirs()}
    found = in_turns({"ours": seconds(ours), "peer": seconds(theirs)}, args.pairs, warm_up=1)
    report(
        f"predict r50-fpn {args.side} px, masks pasted and encoded, images/s",
        {name: [1 / value for value in values] for name, values in found.items()},
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        args.json,
        masks=masks,
    )


if __name__ == "__main__":
    main()
