"""What the GPU programs run: a training step as the workers take it, on drawn images and objects.

It imports neither Ray nor MLflow nor pyarrow, so that a bare machine with torch can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.train_step import drawn_batch
from contract.model import KeypointBranch, MaskBranch, ModelConfig, SoftmaxMask
from contract.presets import preset
from contract.recipe import SGD, LoopConfig
from model.accelerate import accelerate
from model.backbone.networks import FoldedConv2d
from model.build import build_detector
from model.detector import Detector
from model.structures import Batch
from workers.training.graphs import by_graphs_or_eager
from workers.training.optim import build_optimiser
from workers.training.step import Flags, Gradients, LossSums, accumulate_gradients, apply_gradients
from workers.training.world import World

RATE = 1e-4
# What no preset has, and has shapes of its own: others' masks as targets, in a loop over objects
VARIANTS = {
    "r50-fpn-softmax": preset("r50-fpn").model_copy(
        update={"mask": MaskBranch(loss=SoftmaxMask(others="own_class"))}
    )
}


@dataclass(frozen=True)
class Work:
    """One step's work. canvas: height and width in pixels."""

    preset: str = "r50-fpn"
    images: int = 8
    objects: int = 32
    canvas: tuple[int, int] = (800, 1344)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"

    @property
    def model(self) -> ModelConfig:
        """The preset's, or that of `VARIANTS`."""
        return VARIANTS[self.preset] if self.preset in VARIANTS else preset(self.preset)


def batch_of(work: Work) -> Batch:
    """The batch on the host, its pixels in the order of the loader's blocks (channels last)."""
    keypoints = work.model.keypoints
    points = keypoints.num_keypoints if isinstance(keypoints, KeypointBranch) else 0
    batch = drawn_batch(work.images, work.objects, work.canvas, work.model.num_classes, points)
    return replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))


def detector_of(model: ModelConfig, device: str, ours: bool = True) -> Detector:
    """The detector as the workers train it; without `ours` by torch's own operations alone."""
    detector = build_detector(model)
    damp(detector)
    detector = detector.to(device).train()
    if ours:
        accelerate(detector)
    return detector


@torch.no_grad()
def damp(detector: Detector) -> None:
    """Weakens every residual branch: frozen norms do not keep random weights in bounds."""
    for name, module in detector.named_modules():
        if isinstance(module, FoldedConv2d) and name.endswith("conv3"):
            module.norm_weight.fill_(0.2)


class WorkerStep:
    """A step of the training loop without its loader, journal and checkpoints.

    by_graphs: as `loop.cuda_graphs`; all steps have to be within `own_stream(step.loop, ...)`.
    """

    def __init__(
        self,
        detector: Detector,
        precision: Literal["fp32", "bf16", "fp16"],
        by_graphs: bool = False,
    ) -> None:
        self.sums = LossSums(detector)
        self.loop = LoopConfig(precision=precision, cuda_graphs=by_graphs)
        self.world = World(0, 1, next(detector.parameters()).device)
        self.trained = [p for p in detector.parameters() if p.requires_grad]
        self.optimiser = build_optimiser(SGD(), detector)
        self.scaler = torch.amp.GradScaler(
            self.world.device.type, enabled=self.loop.precision == "fp16"
        )
        self.accumulate = by_graphs_or_eager(self._eager, self.sums, self.loop, self.world)

    def _eager(self, batches: Sequence[Batch], flags: Flags) -> Gradients:
        return accumulate_gradients(self.sums, batches, self.loop, self.world, self.scaler, flags)

    def gradients(self, batch: Batch) -> Gradients:
        return self.accumulate([batch], (0.0, 0.0))

    def apply(self) -> Tensor:
        """The optimiser's part; returns the norm of the gradients."""
        keep = self.accumulate.keeps_gradients
        return apply_gradients(self.trained, self.optimiser, self.scaler, RATE, 0.0, keep)

    def __call__(self, batch: Batch) -> Gradients:
        gradients = self.gradients(batch)
        self.apply()
        return gradients
