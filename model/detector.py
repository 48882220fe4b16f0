"""The detector: one step of training as loss terms, one step of inference as padded detections.

Axes: B images, G objects, Q proposals, S sampled RoIs an image, R RoIs in a flat list, D detections, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.backbone.layouts import Maps
from model.branches.box import BoxBranch, Boxes, detect
from model.branches.keypoint import KeypointBranch, keypoint_positions
from model.branches.mask import MaskBranch
from model.branches.paste import paste_all, paste_all_torchvision
from model.cpu import native
from model.pixels import (
    Normalise,
    Resize,
    check_image,
    enter,
    pad_to_multiple,
    test_size,
    zero_padding,
)
from model.roi.crops import SeparateCrops, SharedCrops
from model.roi.samples import FlatRoIs, Samples, flatten
from model.roi.sampling import sample_rois
from model.rpn.network import (
    RPN,
    AnchorOutputs,
    Proposals,
    RPNTargets,
    rpn_losses,
    sample_anchors,
    select_proposals,
)
from model.structures import Batch, Detections, LossTerm


@dataclass(frozen=True)
class Settings:
    """Plain numbers of the training step and of inference, as `contract.model` names them."""

    rpn_batch: int
    rpn_positive_fraction: float
    rpn_positive_iou: float
    rpn_negative_iou: float
    rpn_beta: float
    pre_nms: tuple[int, int]  # training, test
    post_nms: tuple[int, int]
    rpn_nms_iou: float
    min_side_px: float
    rois_per_image: int
    roi_positive_fraction: float
    roi_positive_iou: float
    score_threshold: float
    nms_iou: float
    detections_per_image: int
    short_side_px: int
    max_side_px: int
    canvas_multiple_px: int
    resize: Resize
    paste_as_torchvision: bool


@dataclass(frozen=True)
class _Step:
    """What a training step knows before its heads run."""

    batch: Batch
    maps: Maps
    outputs: AnchorOutputs | None
    rpn_targets: RPNTargets | None
    samples: Samples
    boxes: FlatRoIs
    positives: FlatRoIs


class Detector(nn.Module):
    """Mask R-CNN from built parts. `rpn`, `mask` and `keypoints` may be absent.

    On the CPU padded RoIs are dropped before the heads, where finding them costs no sync; `keep_padding` keeps them
    there too. The numbers are the same.
    """

    def __init__(
        self,
        normalise: Normalise,
        backbone: nn.Module,
        layout: nn.Module,
        rpn: RPN | None,
        crops: SeparateCrops | SharedCrops,
        box: BoxBranch,
        mask: MaskBranch | None,
        keypoints: KeypointBranch | None,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone
        self.layout = layout
        self.rpn = rpn
        self.crops = crops
        self.box = box
        self.mask = mask
        self.keypoints = keypoints
        self.settings = settings
        self.keep_padding = False

    # --- training ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        return self.losses(batch)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The loss terms of one batch by name, as sums and counts; the caller adds the counts over the global batch."""
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
        samples = self._sample(batch, self._proposals(outputs, batch, training=True))
        keep = self.keep_padding or batch.images.device.type != "cpu"
        return _Step(
            batch,
            maps,
            outputs,
            self._rpn_targets(outputs, batch) if outputs is not None else None,
            samples,
            flatten(samples, samples.valid, samples.valid.shape[1], keep),
            flatten(samples, samples.positive, samples.most_positives, keep),
        )

    def _with_needed_objects(self, batch: Batch) -> Batch:
        """At least one object slot; on the CPU no more slots than the fullest image has objects."""
        slots = max(batch.valid.shape[1], 1)
        if batch.images.device.type == "cpu" and not self.keep_padding and len(batch):
            slots = max(int(batch.valid.sum(dim=1).max()), 1)
        names = ("boxes_xyxy", "labels", "valid", "mask_crops", "keypoints")
        return replace(batch, **{name: _fit(getattr(batch, name), slots) for name in names})

    def _read(self, pixels: Tensor) -> tuple[Maps, AnchorOutputs | None]:
        """Normalised pixels (B, 3, H, W) to feature maps and what the RPN makes of them."""
        if pixels.shape[0] == 0:
            raise ValueError("the batch has no image; give a batch of at least one")
        as_library = pixels.device.type == "cpu" and not (
            self.training and native.available()
        )  # see `Convolution`
        layout = torch.contiguous_format if as_library else torch.channels_last
        maps: Maps = self.layout(self.backbone(pixels.contiguous(memory_format=layout)))
        return maps, self.rpn(
            maps.rpn, (pixels.shape[2], pixels.shape[3])
        ) if self.rpn is not None else None

    def _rpn_targets(self, outputs: AnchorOutputs, batch: Batch) -> RPNTargets:
        s = self.settings
        return sample_anchors(
            torch.cat(outputs.anchors),
            batch.boxes_xyxy,
            batch.valid,
            batch.noise_keys,
            s.rpn_positive_iou,
            s.rpn_negative_iou,
            s.rpn_batch,
            s.rpn_positive_fraction,
        )

    def _proposals(self, outputs: AnchorOutputs | None, batch: Batch, training: bool) -> Proposals:
        if outputs is None:
            return _fixed_proposals(
                batch.proposals_xyxy, self.settings.post_nms[0 if training else 1]
            )
        return self._select(outputs, batch.sizes, training)

    def _select(self, outputs: AnchorOutputs, sizes_B2: Tensor, training: bool) -> Proposals:
        s = self.settings
        phase = 0 if training else 1
        return select_proposals(
            outputs, sizes_B2, s.pre_nms[phase], s.post_nms[phase], s.rpn_nms_iou, s.min_side_px
        )

    def _sample(self, batch: Batch, proposals: Proposals) -> Samples:
        s = self.settings
        return sample_rois(
            proposals,
            batch.boxes_xyxy,
            batch.labels,
            batch.valid,
            batch.noise_keys,
            self.box.num_classes,
            s.rois_per_image,
            s.roi_positive_fraction,
            s.roi_positive_iou,
        )

    def _counts(self, step: _Step) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = {}
        if step.rpn_targets is not None:
            counts["rpn_objectness"] = counts["rpn_box"] = step.rpn_targets.count
        counts["box_class"] = counts["box_regression"] = step.boxes.weight.sum()
        if self.mask is not None:
            counts["mask"] = step.positives.weight.sum()
        if self.keypoints is not None:
            counts["keypoints"] = self.keypoints.count(step.positives, step.batch.keypoints)
        return counts

    def _rpn_sums(self, step: _Step) -> dict[str, Tensor]:
        if self.rpn is None or step.outputs is None or step.rpn_targets is None:
            return {}
        targets = step.rpn_targets
        logits, offsets = self.rpn.at(step.maps.rpn, targets.sample.index)
        anchors = torch.cat(step.outputs.anchors)
        objectness, boxes = rpn_losses(logits, offsets, anchors, targets, self.settings.rpn_beta)
        return {"rpn_objectness": objectness, "rpn_box": boxes}

    def _head_sums(self, step: _Step) -> dict[str, Tensor]:
        batch, rois, positives = step.batch, step.boxes, step.positives
        features = self.crops.for_boxes(step.maps.roi, rois.with_image())
        logits, offsets = self.box(features, rois.keys)
        positive = step.samples.positive.flatten()[rois.slot].to(rois.weight.dtype)
        objects = batch.boxes_xyxy[rois.image, rois.objects]
        sums = dict(
            zip(
                ("box_class", "box_regression"),
                self.box.losses(logits, offsets, rois, objects, positive),
                strict=True,
            )
        )
        if self.mask is None and self.keypoints is None:
            return sums
        rows = torch.searchsorted(rois.slot, positives.slot)
        crops = self.crops.for_positives(step.maps.roi, positives.with_image(), features, rows)
        if self.mask is not None:
            sums["mask"] = self.mask.loss(
                crops, positives, batch.boxes_xyxy, batch.mask_crops, batch.labels
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
        return 1.0

    # --- inference --------------------------------------------------------------------------------------------------

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Every module in evaluation mode and no gradients, whatever the mode outside."""
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

    def propose(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The RPN's proposals at test time: boxes (B, Q, 4) in pixels of the image file, scores and valid (B, Q)."""
        if self.rpn is None:
            raise ValueError(
                "this model has proposals.kind 'fixed' and no RPN; propose with a model that trains one"
            )
        with self._inference():
            _, outputs = self._read(zero_padding(self.normalise(batch.images), batch.sizes))
            assert outputs is not None
            proposals = self._select(outputs, batch.sizes, training=False)
        boxes = proposals.boxes_xyxy * _scale(batch.sizes, batch.original_sizes)[:, None]
        return boxes, proposals.scores, proposals.valid

    def predict_image(self, image: Tensor) -> dict[str, Tensor]:
        """One uint8 RGB image (3, H, W) to its N detections, best first, all in the image's own pixels.

        boxes: (N, 4) as x0, y0, x1, y1. scores: (N,). labels: (N,), counted as the class logits are: from 1 where
        the background comes first (torchvision's numbering), else from 0. masks: float (N, H, W), a pixel belongs to
        the object where it reaches 0.5. keypoints: (N, P, 3) as x, y, 1, and keypoints_scores: (N, P).
        Raises ValueError for any other tensor.
        """
        check_image(image)
        if self.rpn is None:
            raise ValueError(
                "proposals.kind is 'fixed': this model predicts batches that carry proposals, not images"
            )
        s = self.settings
        height, width = image.shape[-2:]
        size = test_size(height, width, s.short_side_px, s.max_side_px, s.resize)
        sizes = torch.tensor([size], device=image.device)
        original = torch.tensor([[height, width]], device=image.device)
        with self._inference():
            pixels = pad_to_multiple(
                enter(image, self.normalise, size, s.resize), s.canvas_multiple_px
            )[None]
            maps, outputs = self._read(pixels)
            assert outputs is not None
            proposals = self._select(outputs, sizes, training=False)
            found = self._detect(
                maps, proposals, sizes, original, torch.zeros(1, dtype=torch.int64)
            )
            return self._as_torchvision(found, height, width)

    def _as_torchvision(self, found: Detections, height: int, width: int) -> dict[str, Tensor]:
        kept = found.valid[0]
        boxes = found.boxes_xyxy[0, kept]
        result = {
            "boxes": boxes,
            "scores": found.scores[0, kept],
            "labels": found.labels[0, kept] + int(self.box.background_first),
        }
        if self.mask is not None:
            masks = next(iter(found.masks.values()))[0, kept]
            paste = paste_all_torchvision if self.settings.paste_as_torchvision else paste_all
            result["masks"] = paste(masks, boxes, height, width)
        if self.keypoints is not None:
            points = found.keypoints[0, kept]
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
        image, place = boxes.valid.nonzero(as_tuple=True)
        in_canvas = boxes.boxes_xyxy[image, place]
        scale = _scale(sizes_B2, original_B2)
        masks: dict[str, Tensor] = {}
        keypoints = in_canvas.new_zeros(*boxes.valid.shape, 0, 3)
        if self.mask is not None or self.keypoints is not None:
            crops = self.crops.for_masks(maps.roi, _with_image(image, in_canvas))
            if self.mask is not None:
                maps_R = self.mask.probabilities(crops, boxes.labels[image, place])
                masks = {name: _scatter(values, boxes.valid) for name, values in maps_R.items()}
            if self.keypoints is not None:
                points = keypoint_positions(self.keypoints(crops), in_canvas)
                xy = points[..., :2] * scale[image, None, :2] - self.keypoints.half_pixel_px
                keypoints = _scatter(torch.cat([xy, points[..., 2:]], dim=-1), boxes.valid)
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
        image, place = proposals.valid.nonzero(as_tuple=True)
        rois = _with_image(image, proposals.boxes_xyxy[image, place])
        logits, offsets = self.box(self.crops.for_boxes(maps.roi, rois), torch.zeros_like(image))
        counts = proposals.valid.sum(dim=1).tolist()
        s = self.settings
        return detect(
            torch.split(rois[:, 1:], counts),
            torch.split(self.box.scores(logits), counts),
            torch.split(offsets, counts),
            sizes_B2,
            s.score_threshold,
            s.nms_iou,
            s.detections_per_image,
        )


def _fit(values_BGX: Tensor, slots: int) -> Tensor:
    """The first `slots` objects of each image, padded with zeros if there are fewer."""
    missing = slots - values_BGX.shape[1]
    if missing <= 0:
        return values_BGX[:, :slots]
    return torch.cat(
        [values_BGX, values_BGX.new_zeros(len(values_BGX), missing, *values_BGX.shape[2:])], dim=1
    )


def _fixed_proposals(boxes_BQ4: Tensor, most: int) -> Proposals:
    if boxes_BQ4.shape[1] == 0:
        raise ValueError(
            "proposals.kind is 'fixed', but the batch carries no proposals; give the loader their URI"
        )
    boxes = boxes_BQ4[:, :most]
    valid = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    index = torch.arange(boxes.shape[1], device=boxes.device).expand(boxes.shape[:2])
    return Proposals(boxes, valid.to(boxes.dtype), valid, index)


def _scale(sizes_B2: Tensor, original_B2: Tensor) -> Tensor:
    """(B, 4): what takes x0, y0, x1, y1 from the resized image to the image file."""
    ratio = original_B2.float() / sizes_B2.float()
    return ratio.flip(1).repeat(1, 2)


def _with_image(image_R: Tensor, boxes_R4: Tensor) -> Tensor:
    return torch.cat([image_R[:, None].to(boxes_R4.dtype), boxes_R4], dim=1)


def _scatter(values_RX: Tensor, valid_BD: Tensor) -> Tensor:
    """(R, ...) of the valid slots, in order, to (B, D, ...), zeros elsewhere."""
    result = values_RX.new_zeros(*valid_BD.shape, *values_RX.shape[1:])
    result[valid_BD] = values_RX
    return result
