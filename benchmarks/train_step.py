"""One training step beside torchvision's: the same images, objects, RoI counts, norm layers,
precision and optimiser.

    python benchmarks/train_step.py --preset tiny
    python benchmarks/train_step.py --preset r50-fpn --side 512 --batch 2

Ours and torchvision's steps alternate; the ratio is of the medians of images per second.
`masks_a_step` tells how many positives the mask heads saw. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pairs import in_turns, report, seconds
from contract.presets import preset
from model.accelerate import accelerate
from model.build import build_detector
from model.structures import Batch
from model.weights import from_torchvision


def drawn_batch(
    images: int,
    objects: int,
    canvas: tuple[int, int],
    num_classes: int,
    num_keypoints: int = 0,
) -> Batch:
    """Noise with discs as objects. canvas: height and width in pixels."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas
    size_xy = torch.tensor([float(width), float(height)])
    centre = size_xy * (0.2 + 0.6 * torch.rand(images, objects, 2, generator=generator))
    radius = min(canvas) * (0.05 + 0.15 * torch.rand(images, objects, 1, generator=generator))
    axis = (torch.arange(112) + 0.5) / 56 - 1
    disc = (axis[:, None] ** 2 + axis**2 < 1).to(torch.uint8)
    return Batch(
        images=torch.randint(
            0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator
        ),
        sizes=torch.tensor([canvas] * images),
        original_sizes=torch.tensor([canvas] * images),
        sample_ids=torch.arange(images),
        noise_keys=torch.arange(images),
        boxes_xyxy=torch.cat([centre - radius, centre + radius], dim=2)
        .clamp(min=0)
        .minimum(size_xy.repeat(2)),
        labels=torch.randint(0, num_classes, (images, objects), generator=generator),
        valid=torch.ones(images, objects, dtype=torch.bool),
        mask_crops=disc.expand(images, objects, -1, -1).contiguous(),
        # at the centres, all visible
        keypoints=torch.cat([centre, torch.full_like(centre[..., :1], 2.0)], dim=2)[:, :, None]
        .expand(-1, -1, num_keypoints, -1)
        .contiguous(),
        proposals_xyxy=torch.zeros(images, 0, 4),
    )


def their_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The same objects as torchvision takes them: dense masks."""
    height, width = batch.images.shape[-2:]
    rows = torch.arange(height, device=batch.images.device) + 0.5
    columns = torch.arange(width, device=batch.images.device) + 0.5
    targets = []
    for boxes, labels in zip(batch.boxes_xyxy, batch.labels, strict=True):
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        x = (columns[None, None, :] - middle[:, 0, None, None]) / half[:, 0, None, None]
        y = (rows[None, :, None] - middle[:, 1, None, None]) / half[:, 1, None, None]
        targets.append(
            {"boxes": boxes, "labels": labels + 1, "masks": (x * x + y * y < 1).to(torch.uint8)}
        )
    return targets


def their_model(name: str, side: int) -> nn.Module:
    if name == "r50-fpn":
        return their_r50((side, side))
    return their_tiny(side)


def their_r50(canvas: tuple[int, int]) -> nn.Module:
    """Torchvision's Mask R-CNN with our RoI counts; images of `canvas` keep their size."""
    body = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    sampling = {"rpn_pre_nms_top_n_train": 2000, "rpn_post_nms_top_n_train": 1000}
    return detection.MaskRCNN(body, 81, min_size=min(canvas), max_size=max(canvas), **sampling)


def their_tiny(side: int) -> nn.Module:
    """Torchvision's parts at the sizes of preset `tiny`."""
    network = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=partial(nn.GroupNorm, 16))
    body = BackboneWithFPN(network, {"layer2": "0", "layer3": "1"}, [128, 256], 64, TwoCoarser())
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    return detection.MaskRCNN(
        body,
        min_size=side,
        max_size=side,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(64, 3),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["1"], 7, 2),
        box_head=TwoMLPHead(64 * 49, 256),
        box_predictor=FastRCNNPredictor(256, 5),
        box_batch_size_per_image=64,
        mask_roi_pool=MultiScaleRoIAlign(["1"], 14, 2),
        mask_head=MaskRCNNHeads(64, (64, 64), 1),
        mask_predictor=MaskRCNNPredictor(64, 64, 5),
    )


class TwoCoarser(LastLevelMaxPool):
    """Two maps below the last one, as `tiny` has them."""

    def forward(
        self,
        x: list[Tensor],
        y: list[Tensor],  # noqa: ARG002 - torchvision hands over the inner maps too
        names: list[str],
    ) -> tuple[list[Tensor], list[str]]:
        coarser = x[-1][:, :, ::2, ::2]
        return [*x, coarser, coarser[:, :, ::2, ::2]], [*names, "2", "3"]


def make_step(model: nn.Module, losses: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
            total = losses()
        total.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def share_weights(detector: nn.Module, peer: nn.Module) -> None:
    """The peer's weights for both, with residual branches damped.

    Frozen norms do not keep random ones in bounds.
    """
    for block in (module for module in peer.modules() if isinstance(module, Bottleneck)):
        block.bn3.weight.fill_(0.2)
    detector.load_state_dict(from_torchvision(peer.state_dict()), strict=True)


def sharpen(peer: nn.Module, image: Tensor) -> None:
    """Scales the class logits until a trained model's number of detections passes the usual
    threshold.
    """
    with torch.no_grad():
        for _ in range(10):
            if len(peer([image.float() / 255])[0]["boxes"]) >= peer.roi_heads.detections_per_img:
                return
            peer.roi_heads.box_predictor.cls_score.weight *= 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["torchvision"], default="torchvision")
    parser.add_argument("--preset", choices=["tiny", "r50-fpn"], default="tiny")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--objects", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = preset(args.preset)
    batch = drawn_batch(args.batch, args.objects, (args.side, args.side), cfg.num_classes).to(
        device
    )
    detector, peer = build_detector(cfg), their_model(args.preset, args.side).train()
    if args.preset == "r50-fpn":
        share_weights(detector, peer)
    accelerate(detector)
    detector, peer = detector.to(device), peer.to(device)
    floats, targets = [image.float() / 255 for image in batch.images], their_targets(batch)
    masks: dict[str, list[int]] = {"ours": [], "peer": []}
    peer.roi_heads.mask_head.register_forward_pre_hook(
        lambda _, inputs: masks["peer"].append(len(inputs[0]))
    )

    def ours() -> Tensor:
        terms = detector.losses(batch)
        if device == "cpu":
            masks["ours"].append(int(terms["mask"].count))
        return torch.stack(
            [term.weight * term.sum / term.count.clamp(min=1) for term in terms.values()]
        ).sum()

    steps = {
        "ours": make_step(detector, ours, args.bf16),
        "peer": make_step(
            peer, lambda: torch.stack(list(peer(floats, targets).values())).sum(), args.bf16
        ),
    }
    measure(steps, args, device, masks)


def measure(
    steps: dict[str, Callable[[], None]], args: Any, device: str, masks: dict[str, list[int]]
) -> None:
    """Images per second in turns after two rounds to warm up.

    On a GPU the peak memory above what is resident too.
    """
    cuda = device == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None
    found = in_turns(
        {name: seconds(step, finish) for name, step in steps.items()}, args.pairs, warm_up=2
    )
    more: dict[str, Any] = {
        "masks_a_step": {n: statistics.median(v) for n, v in masks.items() if v}
    }
    if cuda:
        more["peak_mib"] = {name: peak_mib(step) for name, step in steps.items()}
    precision = "bf16" if args.bf16 else "fp32"
    report(
        f"train step {args.preset} {args.side} px batch {args.batch} {precision}, images/s",
        {name: [args.batch / value for value in values] for name, values in found.items()},
        torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        args.json,
        **more,
    )


def peak_mib(step: Callable[[], None]) -> float:
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return round((torch.cuda.max_memory_allocated() - resident) / 2**20, 1)


if __name__ == "__main__":
    main()
