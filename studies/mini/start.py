"""The common start of the mini studies' arms, as ImageNet's weights are the paper's.

A classifier of the twelve outlines, on crops of scenes that no study sees. It knows neither boxes
nor RoI operations, so it favours no arm. It writes a state dict with torchvision's names, for
`model.weights: {kind: file}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from contract.presets import preset
from model.build import build_backbone

SIDE = 64  # px of a crop
MARGIN = 0.15  # of a box, around it
BATCH = 32
HELD_OUT = 500  # crops, to print an accuracy on


def crops(data: Path) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, SIDE, SIDE) and the labels from 0, of all objects but crowds."""
    coco = json.loads((data / "annotations/instances_train.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    pixels, labels = [], []
    image_id, image = -1, Image.new("RGB", (1, 1))
    for annotation in coco["annotations"]:
        if annotation["iscrowd"]:
            continue
        if annotation["image_id"] != image_id:
            image_id = annotation["image_id"]
            image = Image.open(data / "images/train" / names[image_id]).convert("RGB")
        x, y, w, h = annotation["bbox"]
        half = (0.5 + MARGIN) * max(w, h)
        middle_x, middle_y = x + w / 2, y + h / 2
        box = tuple(
            round(v) for v in (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
        )
        pixels.append(np.asarray(image.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        labels.append(annotation["category_id"] - 1)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


class Classifier(nn.Module):
    """The backbone of `tiny`, with all of its stages, and a linear layer on their mean."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        tiny = preset("tiny")
        self.body, channels = build_backbone(tiny.backbone, 4)
        self.logits = nn.Linear(channels[-1], num_classes)
        self.register_buffer("mean", torch.tensor(tiny.image.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(tiny.image.std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to logits."""
        return self.logits(self.body((pixels - self.mean) / self.std)[-1].mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="scenes that `maskray data synth` drew")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} crops (default 600)")
    args = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels = crops(args.data)
    order = torch.randperm(len(labels))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    model = Classifier(int(labels.max()) + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, args.steps)
    for step in range(args.steps):
        chosen = train[torch.randint(len(train), (BATCH,))]
        batch = pixels[chosen]
        if step % 2:
            batch = batch.flip(3)
        shift = torch.randint(-4, 5, (2,)).tolist()
        loss = nn.functional.cross_entropy(model(batch.roll(shift, (2, 3))), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        guessed = torch.cat([model(part).argmax(1) for part in pixels[held_out].split(BATCH)])
    print(f"{100 * (guessed == labels[held_out]).float().mean():.0f}% of {HELD_OUT} crops right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.body.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
