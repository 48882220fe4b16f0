"""The detector: one step of training as loss terms, one step of inference as padded detections.

Axes: B images, G objects, Q proposals, S sampled RoIs an image, R RoIs in a flat list, D
detections, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.backbone.layouts import Maps
from model.branches.box import BoxBranch, Boxes
from model.branches.keypoint import KeypointBranch, keypoint_positions
from model.branches.mask import MaskBranch
from model.pixels import ImageSize, Normalise, check_image, zero_padding
from model.roi.crops import SeparateCrops, SharedCrops
from model.roi.samples import FlatRoIs, Samples, flatten
from model.roi.sampling import RoISampler
from model.rpn.network import RPN, RPNTargets
from model.rpn.proposals import AnchorOutputs, FixedProposals, Proposals
from model.structures import Batch, Detections, LossTerm


@dataclass(frozen=True)
class _Step:
    """The parts of a training step that exist before its heads run."""

    batch: Batch
    maps: Maps
    outputs: AnchorOutputs | None
    rpn_targets: RPNTargets | None
    samples: Samples
    boxes: FlatRoIs
    positives: FlatRoIs
    masked: FlatRoIs  # the positives, weighted for the mask loss


class Detector(nn.Module):
    """Mask R-CNN from built parts. `mask` and `keypoints` may be absent.

    Proposals come from an RPN, or from a file with the batch.

    On the CPU padded RoIs are dropped before the heads, because finding them costs no sync there;
    `keep_padding` keeps them there too. The numbers are the same.
    """

    def __init__(
        self,
        normalise: Normalise,
        image_size: ImageSize,
        backbone: nn.Module,
        layout: nn.Module,
        proposals: RPN | FixedProposals,
        sampler: RoISampler,
        crops: SeparateCrops | SharedCrops,
        box: BoxBranch,
        mask: MaskBranch | None,
        keypoints: KeypointBranch | None,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.image_size = image_size
        self.backbone = backbone
        self.layout = layout
        self.rpn = proposals if isinstance(proposals, RPN) else None
        self.fixed = proposals if isinstance(proposals, FixedProposals) else None
        self.sampler = sampler
        self.crops = crops
        self.box = box
        self.mask = mask
        self.keypoints = keypoints
        self.keep_padding = False
        # In training; `model.cpu.accelerate` sets it, because its kernels read channels-last maps.
        self.channels_last_on_cpu = False

    # --- training ---------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        """As `losses`; DDP calls it."""
        return self.losses(batch)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The loss terms of one batch by name, as sums and counts.

        The caller adds the counts over the global batch.
        """
        step = self._prepare(batch)
        counts = self._counts(step)
        sums = {**self._rpn_sums(step), **self._head_sums(step)}
        return {
            name: LossTerm(value, counts[name], self._weight(name)) for name, value in sums.items()
        }

    @torch.no_grad()
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts that `losses(batch)` would return, without running the heads."""
        return self._counts(self._prepare(batch))

    def _prepare(self, batch: Batch) -> _Step:
        batch = self._with_needed_objects(batch)
        maps, outputs = self._read(zero_padding(self.normalise(batch.images), batch.sizes))
        samples: Samples = self.sampler(
            self._proposals(outputs, batch, training=True),
            batch.boxes_xyxy,
            batch.labels,
            batch.valid,
            batch.noise_keys,
        )
        keep = self._keeps_padding(batch.images)
        positives = flatten(samples, samples.positive, samples.most_positives, keep)
        return _Step(
            batch,
            maps,
            outputs,
            self._rpn_targets(outputs, batch),
            samples,
            flatten(samples, samples.valid, samples.valid.shape[1], keep),
            positives,
            positives if self.mask is None else _with_masks(positives, batch.mask_crops),
        )

    def _with_needed_objects(self, batch: Batch) -> Batch:
        """At least one object slot; on the CPU no more slots than the fullest image has objects."""
        # One slot without an object: matching and gathering need something to point at.
        slots = max(batch.valid.shape[1], 1)
        if not self._keeps_padding(batch.images) and len(batch):
            slots = max(int(batch.valid.sum(dim=1).max()), 1)
        names = ("boxes_xyxy", "labels", "valid", "mask_crops", "keypoints")
        return replace(batch, **{name: _fit(getattr(batch, name), slots) for name in names})

    def _read(self, pixels: Tensor) -> tuple[Maps, AnchorOutputs | None]:
        """Normalised pixels (B, 3, H, W) to feature maps and the RPN's outputs on them."""
        if pixels.shape[0] == 0:
            raise ValueError("the batch has no image; give a batch of at least one")
        # Evaluation on a CPU stays channels first: it rounds as other implementations do.
        first = pixels.device.type == "cpu" and not (self.training and self.channels_last_on_cpu)
        layout = torch.contiguous_format if first else torch.channels_last
        maps: Maps = self.layout(self.backbone(pixels.contiguous(memory_format=layout)))
        canvas = (pixels.shape[2], pixels.shape[3])
        return maps, self.rpn(maps.rpn, canvas) if self.rpn is not None else None

    def _proposals(self, outputs: AnchorOutputs | None, batch: Batch, training: bool) -> Proposals:
        if self.fixed is not None:
            return self.fixed(batch.proposals_xyxy, training)
        assert self.rpn is not None
        assert outputs is not None
        return self.rpn.propose(outputs, batch.sizes, training)

    def _rpn_targets(self, outputs: AnchorOutputs | None, batch: Batch) -> RPNTargets | None:
        if self.rpn is None or outputs is None:
            return None
        return self.rpn.targets(outputs, batch.boxes_xyxy, batch.valid, batch.noise_keys)

    def _counts(self, step: _Step) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = {}
        if step.rpn_targets is not None:
            counts["rpn_objectness"] = counts["rpn_box"] = step.rpn_targets.count
        # The box loss too is divided by all sampled RoIs (Fast R-CNN), the mask loss by the
        # positives.
        counts["box_class"] = counts["box_regression"] = step.boxes.weight.sum()
        if self.mask is not None:
            counts["mask"] = step.masked.weight.sum()
        if self.keypoints is not None:
            counts["keypoints"] = self.keypoints.count(step.positives, step.batch.keypoints)
        return counts

    def _rpn_sums(self, step: _Step) -> dict[str, Tensor]:
        if self.rpn is None or step.outputs is None or step.rpn_targets is None:
            return {}
        objectness, boxes = self.rpn.losses(step.maps.rpn, step.outputs, step.rpn_targets)
        return {"rpn_objectness": objectness, "rpn_box": boxes}

    def _head_sums(self, step: _Step) -> dict[str, Tensor]:
        batch, rois, positives = step.batch, step.boxes, step.positives
        features = self.crops.for_boxes(step.maps.roi, rois.with_image())
        logits, offsets = self.box(features, rois.keys)
        positive = step.samples.positive.flatten()[rois.slot].to(rois.weight.dtype)
        objects = batch.boxes_xyxy[rois.image, rois.objects]
        classes, regression = self.box.losses(logits, offsets, rois, objects, positive)
        sums = {"box_class": classes, "box_regression": regression}
        if self.mask is None and self.keypoints is None:
            return sums
        # Both lists are ordered by slot, so a search finds each positive among the box RoIs.
        rows = torch.searchsorted(rois.slot, positives.slot)
        crops = self.crops.for_positives(step.maps.roi, positives.with_image(), features, rows)
        if self.mask is not None:
            sums["mask"] = self.mask.loss(
                crops, step.masked, batch.boxes_xyxy, batch.mask_crops, batch.labels
            )
        if self.keypoints is not None:
            sums["keypoints"] = self.keypoints.loss(
                self.keypoints(crops), positives, batch.keypoints
            )
        return sums

    def _weight(self, name: str) -> float:
        if name == "mask" and self.mask is not None:
            return self.mask.loss_weight
        if name == "keypoints" and self.keypoints is not None:
            return self.keypoints.loss_weight
        return self.box.loss_weight if name in ("box_class", "box_regression") else 1.0

    # --- inference --------------------------------------------------------------------------------

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Every module in evaluation mode and no gradients, whatever the mode outside."""
        # Module by module: `self.train()` at the end would wake frozen norms that a caller put to
        # evaluation.
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def predict(self, batch: Batch) -> Detections:
        """The detections of each image, in pixels of the image file."""
        with self._inference():
            maps, outputs = self._read(zero_padding(self.normalise(batch.images), batch.sizes))
            proposals = self._proposals(outputs, batch, training=False)
            return self._detect(
                maps, proposals, batch.sizes, batch.original_sizes, batch.sample_ids
            )

    def propose(self, batch: Batch, training: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The RPN's proposals: boxes (B, Q, 4), scores and valid (B, Q).

        Boxes are in pixels of the image file. training: as many as a training image gets.

        Raises ValueError without an RPN.
        """
        if self.rpn is None:
            raise ValueError(
                "this model has proposals.kind 'fixed' and no RPN; "
                "propose with a model that trains one"
            )
        with self._inference():
            _, outputs = self._read(zero_padding(self.normalise(batch.images), batch.sizes))
            assert outputs is not None
            proposals = self.rpn.propose(outputs, batch.sizes, training)
        boxes = proposals.boxes_xyxy * _scale(batch.sizes, batch.original_sizes)[:, None]
        return boxes, proposals.scores, proposals.valid

    def predict_image(self, image: Tensor) -> dict[str, Tensor]:
        """One uint8 RGB image (3, H, W) to its N detections, best first, in the image's own pixels.

        boxes: (N, 4) as x0, y0, x1, y1. scores: (N,). labels: (N,), counted as the class logits
        are: from 1 where the background comes first (torchvision's numbering), else from 0. masks:
        float (N, H, W), a pixel belongs to the object where it reaches 0.5. keypoints: (N, P, 3) as
        x, y, 1, and keypoints_scores: (N, P). Raises ValueError for any other tensor.
        """
        check_image(image)
        if self.rpn is None:
            raise ValueError(
                "proposals.kind is 'fixed': "
                "this model predicts batches that carry proposals, not images"
            )
        height, width = image.shape[-2:]
        original = torch.tensor([[height, width]], device=image.device)
        with self._inference():
            pixels, size = self.image_size.enter(image, self.normalise)
            sizes = torch.tensor([size], device=image.device)
            maps, outputs = self._read(pixels)
            assert outputs is not None
            proposals = self.rpn.propose(outputs, sizes, training=False)
            no_id = torch.zeros(1, dtype=torch.int64)
            detections = self._detect(maps, proposals, sizes, original, no_id)
            return self._as_torchvision(detections, height, width)

    def _as_torchvision(self, detections: Detections, height: int, width: int) -> dict[str, Tensor]:
        kept = detections.valid[0]
        boxes = detections.boxes_xyxy[0, kept]
        result = {
            "boxes": boxes,
            "scores": detections.scores[0, kept],
            "labels": detections.labels[0, kept] + int(self.box.background_first),
        }
        if self.mask is not None:
            masks = next(iter(detections.masks.values()))[0, kept]
            result["masks"] = self.mask.paste(masks, boxes, height, width)
        if self.keypoints is not None:
            points = detections.keypoints[0, kept]
            # torchvision's third number is the visibility, and it is always 1.
            result["keypoints"] = torch.cat(
                [points[..., :2], torch.ones_like(points[..., :1])], dim=-1
            )
            result["keypoints_scores"] = points[..., 2]
        return result

    def _detect(
        self,
        maps: Maps,
        proposals: Proposals,
        sizes_B2: Tensor,
        original_B2: Tensor,
        sample_ids: Tensor,
    ) -> Detections:
        boxes = self._boxes(maps, proposals, sizes_B2)
        image, place = self._computed(boxes.valid)
        in_canvas = boxes.boxes_xyxy[image, place]
        scale = _scale(sizes_B2, original_B2)
        masks: dict[str, Tensor] = {}
        keypoints = in_canvas.new_zeros(*boxes.valid.shape, 0, 3)
        if self.mask is not None or self.keypoints is not None:
            # Masks and keypoints of the final boxes alone, as in the paper (section 3).
            crops = self.crops.for_masks(maps.roi, _with_image(image, in_canvas))
            if self.mask is not None:
                maps_R = self.mask.probabilities(crops, boxes.labels[image, place])
                masks = {
                    name: _scatter(values, image, place, boxes.valid)
                    for name, values in maps_R.items()
                }
            if self.keypoints is not None:
                points = keypoint_positions(self.keypoints(crops), in_canvas)
                xy = points[..., :2] * scale[image, None, :2] - self.keypoints.half_pixel_px
                found = torch.cat([xy, points[..., 2:]], dim=-1)
                keypoints = _scatter(found, image, place, boxes.valid)
        return Detections(
            boxes.boxes_xyxy * scale[:, None],
            boxes.scores,
            boxes.labels,
            boxes.valid,
            masks,
            keypoints,
            original_B2,
            sample_ids,
        )

    def _boxes(self, maps: Maps, proposals: Proposals, sizes_B2: Tensor) -> Boxes:
        image, place = self._computed(proposals.valid)
        rois = _with_image(image, proposals.boxes_xyxy[image, place])
        # Inference has no dropout: the keys of the RoIs do not matter.
        logits, offsets = self.box(self.crops.for_boxes(maps.roi, rois), torch.zeros_like(image))
        scores = self.box.scores(logits)
        if self._keeps_padding(proposals.valid):
            shape = proposals.valid.shape
            return self.box.selection.padded(
                proposals.boxes_xyxy,
                proposals.valid,
                torch.unflatten(scores, 0, shape),
                torch.unflatten(offsets, 0, shape),
                sizes_B2,
            )
        counts = proposals.valid.sum(dim=1).tolist()
        selected: Boxes = self.box.selection(
            torch.split(rois[:, 1:], counts),
            torch.split(scores, counts),
            torch.split(offsets, counts),
            sizes_B2,
        )
        return selected

    def _computed(self, valid_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Image and place of the slots that the heads compute, each of them flat."""
        if self._keeps_padding(valid_BN):
            slot = torch.arange(valid_BN.numel(), device=valid_BN.device)
            most = valid_BN.shape[1]
            return torch.div(slot, most, rounding_mode="floor"), slot % most
        image, place = valid_BN.nonzero(as_tuple=True)
        return image, place

    def _keeps_padding(self, values: Tensor) -> bool:
        # A GPU would wait for the number of real RoIs, so it computes the padded ones too.
        return self.keep_padding or values.device.type != "cpu"


def _with_masks(positives: FlatRoIs, mask_crops: Tensor) -> FlatRoIs:
    """Positives whose object has no mask weigh nothing: it trains its box alone.

    Without the object its place would be background, and finding it would be punished.
    """
    has_mask = mask_crops.flatten(2).any(dim=2)[positives.image, positives.objects]
    return replace(positives, weight=positives.weight * has_mask.to(positives.weight.dtype))


def _fit(values_BGX: Tensor, slots: int) -> Tensor:
    """The first `slots` objects of each image, padded with zeros if there are fewer."""
    missing = slots - values_BGX.shape[1]
    if missing <= 0:
        return values_BGX[:, :slots]
    return torch.cat(
        [values_BGX, values_BGX.new_zeros(len(values_BGX), missing, *values_BGX.shape[2:])], dim=1
    )


def _scale(sizes_B2: Tensor, original_B2: Tensor) -> Tensor:
    """(B, 4): the factors of x0, y0, x1, y1 from the resized image to the image file."""
    ratio = original_B2.float() / sizes_B2.float()
    return ratio.flip(1).repeat(1, 2)


def _with_image(image_R: Tensor, boxes_R4: Tensor) -> Tensor:
    return torch.cat([image_R[:, None].to(boxes_R4.dtype), boxes_R4], dim=1)


def _scatter(values_RX: Tensor, image_R: Tensor, place_R: Tensor, valid_BD: Tensor) -> Tensor:
    """(R, ...) of some slots to (B, D, ...), zeros where a slot is not valid."""
    result = values_RX.new_zeros(*valid_BD.shape, *values_RX.shape[1:])
    result[image_R, place_R] = values_RX
    padding = ~valid_BD[(...,) + (None,) * (values_RX.dim() - 1)]
    return result.masked_fill(padding, 0)
