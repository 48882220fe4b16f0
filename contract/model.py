"""Every arm of the paper as frozen records: one union per choice, one field per switch.

Only `model.build` reads these; modules take plain arguments. Sources: Mask R-CNN (arXiv 1703.06870
v3), Faster R-CNN (1506.01497), FPN (1612.03144), MNC for RoIWarp (1512.04412).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator

from contract.record import Record

# Far above any network's. What lies beyond is a slip of the pen: this message names it, the
# allocator's would not.
_MOST_CHANNELS, _MOST_LAYERS, _MOST_PX, _MOST_BOXES = 16_384, 64, 65_536, 100_000


class FrozenBatchNorm(Record):
    """Batch-norm as a fixed scale and bias from pretrained statistics.

    Torchvision runs its released detectors (`COCO_V1`) with eps 0, and everything else with 1e-5.
    """

    kind: Literal["frozen_bn"] = "frozen_bn"
    eps: float = Field(1e-5, ge=0)


class GroupNorm(Record):
    """Group norm: trains from scratch and does not depend on the number of ranks."""

    kind: Literal["gn"] = "gn"
    groups: int = Field(32, ge=1)

    @field_validator("groups")
    @classmethod
    def _divides(cls, value: int) -> int:
        if (
            64 % value
        ):  # the stem has 64 channels, and every other normed width of every backbone is a multiple
            raise ValueError(
                "must divide the 64 channels of the backbone's stem; "
                "choose 1, 2, 4, 8, 16, 32 or 64"
            )
        return value


class BatchNorm(Record):
    """Trained batch-norm. Its statistics are per rank: results depend on the world size."""

    kind: Literal["bn"] = "bn"


Norm: TypeAlias = Annotated[FrozenBatchNorm | GroupNorm | BatchNorm, Field(discriminator="kind")]


class ResNet(Record):
    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    norm: Norm = FrozenBatchNorm()
    frozen_stages: int = Field(
        2, ge=0, le=5
    )  # 0 trains all, 1 freezes the stem, 2 the stem and res2, ...
    # where a downsampling bottleneck puts its stride; detectron2's MSRA weights need True
    stride_in_1x1: bool = False

    @model_validator(mode="after")
    def _has_1x1(self) -> ResNet:
        if self.stride_in_1x1 and self.depth < 50:
            raise ValueError(
                f"stride_in_1x1 is about bottlenecks, ResNet-{self.depth} has none; "
                "depths 50 and 101 do"
            )
        return self


class ResNeXt(Record):
    kind: Literal["resnext"] = "resnext"
    variant: Literal["50-32x4d", "101-32x8d", "101-64x4d"] = "101-64x4d"
    norm: Norm = FrozenBatchNorm()
    frozen_stages: int = Field(2, ge=0, le=5)


class VGG16(Record):
    """VGG-16 up to conv5_3, one map of stride 16, as in the original Faster R-CNN."""

    kind: Literal["vgg16"] = "vgg16"
    frozen_stages: int = Field(2, ge=0, le=5)  # convolution blocks


Backbone: TypeAlias = Annotated[ResNet | ResNeXt | VGG16, Field(discriminator="kind")]


class NoWeights(Record):
    """Keyed random initialisation."""

    kind: Literal["none"] = "none"


class TorchvisionWeights(Record):
    """A torchvision ImageNet checkpoint of the configured backbone, by its recipe's name."""

    kind: Literal["torchvision"] = "torchvision"
    name: Literal["IMAGENET1K_V1", "IMAGENET1K_V2"] = "IMAGENET1K_V1"


class FileWeights(Record):
    """A state dict in a local file: a backbone's, or a whole detector's in one of three layouts."""

    kind: Literal["file"] = "file"
    path: str = Field(min_length=1)
    layout: Literal["backbone", "maskray", "torchvision", "detectron2"] = "backbone"


Weights: TypeAlias = Annotated[
    NoWeights | TorchvisionWeights | FileWeights, Field(discriminator="kind")
]

Deviation: TypeAlias = Annotated[float, Field(ge=1e-3)]


class ImageInput(Record):
    """How uint8 pixels enter the network, and the size of an image at test time."""

    mean: tuple[float, float, float] = (
        0.485 * 255,
        0.456 * 255,
        0.406 * 255,
    )  # in the order of `channels`
    std: tuple[Deviation, Deviation, Deviation] = (0.229 * 255, 0.224 * 255, 0.225 * 255)
    channels: Literal["rgb", "bgr"] = "rgb"
    short_side_px: int = Field(800, ge=16, le=_MOST_PX)
    max_side_px: int = Field(1333, ge=16, le=_MOST_PX)
    canvas_multiple_px: int = Field(32, ge=1, le=_MOST_PX)
    resize: Literal["antialias", "torchvision-detection"] = "antialias"

    @model_validator(mode="after")
    def _short_is_not_longer(self) -> ImageInput:
        if self.max_side_px < self.short_side_px:
            raise ValueError(
                f"max_side_px = {self.max_side_px} is below short_side_px = {self.short_side_px}, "
                "which would then have no effect; raise the one or lower the other"
            )
        return self


class C4(Record):
    """RPN and RoIs on res4 (stride 16); res5 is the RoI head, on 7 x 7 at stride 1.

    See Mask R-CNN, section 4.

    The released code (Detectron, detectron2) crops 14 x 14 and lets res5 halve it: `roi_side` 14.
    """

    kind: Literal["c4"] = "c4"
    roi_side: Literal[7, 14] = 7


class C5(Record):
    """RPN and RoIs on res5 at its true stride of 32, then FPN-style heads (res5 is used up)."""

    kind: Literal["c5"] = "c5"
    channels: int = Field(256, ge=8, le=_MOST_CHANNELS)


class Conv5(Record):
    """RPN and RoIs on VGG-16's conv5_3 (stride 16), as in Faster R-CNN."""

    kind: Literal["conv5"] = "conv5"


class FPN(Record):
    """Feature pyramid; a RoI's level is floor(4 + log2(sqrt(wh) / 224)), clamped to `roi_strides`.

    The RPN reads every map. Up to the length of `anchors.sizes_px` it also reads coarser ones, each
    of which halves the last (P6).
    """

    kind: Literal["fpn"] = "fpn"
    channels: int = Field(256, ge=8, le=_MOST_CHANNELS)
    strides: tuple[Literal[4, 8, 16, 32], ...] = Field(
        (4, 8, 16, 32), min_length=1
    )  # the backbone maps merged
    roi_strides: tuple[Literal[4, 8, 16, 32], ...] = Field((4, 8, 16, 32), min_length=1)

    @model_validator(mode="after")
    def _consecutive(self) -> FPN:
        for name, strides in (("strides", self.strides), ("roi_strides", self.roi_strides)):
            if any(coarser != 2 * finer for finer, coarser in pairwise(strides)):
                raise ValueError(
                    f"{name} must double from one to the next, finest first; they are {strides}"
                )
        if not set(self.roi_strides) <= set(self.strides):
            raise ValueError(f"roi_strides {self.roi_strides} must be among strides {self.strides}")
        return self


Layout: TypeAlias = Annotated[C4 | C5 | Conv5 | FPN, Field(discriminator="kind")]

AnchorSize: TypeAlias = Annotated[int, Field(ge=1, le=_MOST_PX)]

AnchorSizes: TypeAlias = Annotated[tuple[AnchorSize, ...], Field(min_length=1, max_length=64)]

AnchorRatio: TypeAlias = Annotated[float, Field(ge=1e-3, le=1e3)]


class Anchors(Record):
    """Anchor sides in pixels, a tuple per level (finest first), and height/width ratios."""

    sizes_px: tuple[AnchorSizes, ...] = Field(
        ((32,), (64,), (128,), (256,), (512,)), min_length=1, max_length=8
    )
    ratios: tuple[AnchorRatio, ...] = Field((0.5, 1.0, 2.0), min_length=1, max_length=64)
    rounded: bool = False  # torchvision's: base anchors in whole pixels, strides of canvas // cells

    @model_validator(mode="after")
    def _rounded_ones_have_an_area(self) -> Anchors:
        size = min(size for sizes in self.sizes_px for size in sizes)
        ratio = max(max(ratio, 1 / ratio) for ratio in self.ratios)
        if (
            self.rounded and round(size / ratio**0.5 / 2) == 0
        ):  # half a side, as the anchors are rounded
            raise ValueError(
                f"rounded to whole pixels, the anchor of {size} px in sizes_px has no area at the "
                f"most oblong of ratios {self.ratios}; give larger sizes or leave rounded off"
            )
        return self


class L1(Record):
    kind: Literal["l1"] = "l1"


class SmoothL1(Record):
    """Quadratic below `beta` (Fast R-CNN, equation 3, has beta 1)."""

    kind: Literal["smooth_l1"] = "smooth_l1"
    beta: float = Field(1 / 9, ge=1e-6)  # below, its gradient overflows; "l1" is the limit


BoxLoss: TypeAlias = Annotated[L1 | SmoothL1, Field(discriminator="kind")]


class RPN(Record):
    """Region proposal network: sampling for its loss, and the filter from anchors to proposals."""

    batch_per_image: int = Field(256, ge=1, le=_MOST_BOXES)
    positive_fraction: float = Field(0.5, gt=0, le=1)
    positive_iou: float = Field(0.7, gt=0, le=1)
    negative_iou: float = Field(0.3, ge=0, lt=1)
    pre_nms_train: int = Field(2000, ge=1, le=_MOST_BOXES)  # per level and image
    pre_nms_test: int = Field(1000, ge=1, le=_MOST_BOXES)
    post_nms_train: int = Field(1000, ge=1, le=_MOST_BOXES)  # per image
    post_nms_test: int = Field(1000, ge=1, le=_MOST_BOXES)
    nms_iou: float = Field(0.7, gt=0, le=1)
    min_side_px: float = Field(1e-3, gt=0)
    box_loss: BoxLoss = L1()

    @model_validator(mode="after")
    def _samples_are_of_both_kinds(self) -> RPN:
        if self.positive_iou < self.negative_iou:
            raise ValueError(
                f"positive_iou = {self.positive_iou} is below negative_iou = {self.negative_iou}: "
                "an anchor between them would be both; raise the one or lower the other"
            )
        _check_positives("batch_per_image", self.batch_per_image, self.positive_fraction)
        return self


def _check_positives(name: str, size: int, fraction: float) -> None:
    if int(size * fraction) == 0:  # as `model.matching.sample` counts them
        raise ValueError(
            f"{name} = {size} with positive_fraction = {fraction} leaves room for no positive, so "
            "no box would be learnt; their product must be at least 1"
        )


class EndToEnd(Record):
    """The RPN trains with the heads and proposes for them; no gradient through RoI coordinates."""

    kind: Literal["end_to_end"] = "end_to_end"


class FixedProposals(Record):
    """Proposals by image id from a file of `maskray proposals`.

    Arms of one backbone share them, as in the paper.
    """

    kind: Literal["fixed"] = "fixed"
    uri: str = Field(min_length=1)


Proposals: TypeAlias = Annotated[EndToEnd | FixedProposals, Field(discriminator="kind")]


class RoIAlign(Record):
    """Mean or max of bilinear samples per bin (Mask R-CNN, section 3)."""

    kind: Literal["align"] = "align"
    samples: int = Field(
        2, ge=0, le=64
    )  # points per bin side; 0: as many as the bin has cells (detectron2)
    reduce: Literal["mean", "max"] = "mean"
    aligned: bool = True  # pixel centres at half-integers

    @model_validator(mode="after")
    def _samples_are_fixed_for_max(self) -> RoIAlign:
        if self.reduce == "max" and self.samples == 0:
            raise ValueError(
                "roi.samples = 0 (as many as the bin has cells) works with reduce 'mean' only; "
                "give 1 or more"
            )
        return self


class RoIPool(Record):
    """Max over integer bins of a rounded RoI (Fast R-CNN)."""

    kind: Literal["pool"] = "pool"


class RoIWarp(Record):
    """The RoI is quantised as in RoIPool, then sampled bilinearly, then reduced.

    From MNC, as Table 2c compares it.
    """

    kind: Literal["warp"] = "warp"
    reduce: Literal["mean", "max"] = "mean"


RoIOp: TypeAlias = Annotated[RoIAlign | RoIPool | RoIWarp, Field(discriminator="kind")]


class RoISampling(Record):
    """Which proposals train the heads."""

    rois_per_image: int = Field(512, ge=1, le=_MOST_BOXES)
    positive_fraction: float = Field(0.25, gt=0, le=1)
    positive_iou: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _some_are_positive(self) -> RoISampling:
        _check_positives("rois_per_image", self.rois_per_image, self.positive_fraction)
        return self


class Res5Head(Record):
    """The last ResNet stage on each RoI, then average pooling: the box head of C4."""

    kind: Literal["res5"] = "res5"


class FCHead(Record):
    """Fully connected layers on 7 x 7 features: the box head of FPN and C5."""

    kind: Literal["fc"] = "fc"
    layers: int = Field(2, ge=1, le=_MOST_LAYERS)
    width: int = Field(1024, ge=8, le=_MOST_CHANNELS)


class VGGHead(Record):
    """fc6 and fc7 of VGG-16 (4096 wide, dropout as in Faster R-CNN left to `dropout`)."""

    kind: Literal["vgg"] = "vgg"
    dropout: float = Field(0.5, ge=0, lt=1)


BoxHead: TypeAlias = Annotated[Res5Head | FCHead | VGGHead, Field(discriminator="kind")]


class BoxInference(Record):
    score_threshold: float = Field(0.05, ge=0, lt=1)
    nms_iou: float = Field(0.5, gt=0, le=1)
    detections_per_image: int = Field(100, ge=1, le=_MOST_BOXES)


class FCNMask(Record):
    """Convolutions, one deconvolution, a 1 x 1 predictor (Fig. 4).

    `convs` is 4 for FPN and C5, and 0 after res5.
    """

    kind: Literal["fcn"] = "fcn"
    convs: int = Field(4, ge=0, le=_MOST_LAYERS)
    width: int = Field(256, ge=8, le=_MOST_CHANNELS)


class MLPMask(Record):
    """Fully connected layers that predict 28 x 28 masks (Table 2e).

    `layers` counts the hidden ones before the output.
    """

    kind: Literal["mlp"] = "mlp"
    layers: Literal[2, 3] = 2
    width: int = Field(1024, ge=8, le=_MOST_CHANNELS)
    input_side: Literal[7, 14] = 14  # cells of the RoI; after C4's res5 there are 7 anyway


MaskHead: TypeAlias = Annotated[FCNMask | MLPMask, Field(discriminator="kind")]


class SigmoidMask(Record):
    """Independent masks per class: a sigmoid per pixel, a binary loss on the true class alone.

    See section 3.
    """

    inferences: ClassVar[tuple[str, ...]] = ()  # one way alone, which needs no name

    kind: Literal["sigmoid"] = "sigmoid"
    class_agnostic: bool = False

    def num_channels(self, num_classes: int) -> int:
        """How many masks the head predicts for a RoI."""
        return 1 if self.class_agnostic else num_classes


# What makes a mask of the softmax's probabilities; `model.branches.mask` defines each.
SoftmaxInference: TypeAlias = Literal["probability", "argmax", "versus_background"]


class SoftmaxMask(Record):
    """A softmax per pixel over the K classes and background (Table 2b).

    The paper defines neither the targets nor the inference.
    """

    inferences: ClassVar[tuple[str, ...]] = get_args(SoftmaxInference)  # all are evaluated

    kind: Literal["softmax"] = "softmax"
    others: Literal["background", "own_class"] = "background"  # other instances inside the RoI
    inference: SoftmaxInference = "argmax"  # this one is `segm/AP`

    def num_channels(self, num_classes: int) -> int:
        """How many masks the head predicts for a RoI: one for each class, and the background."""
        return num_classes + 1


MaskLoss: TypeAlias = Annotated[SigmoidMask | SoftmaxMask, Field(discriminator="kind")]


class NoMask(Record):
    kind: Literal["none"] = "none"


class MaskBranch(Record):
    kind: Literal["mask"] = "mask"
    head: MaskHead = FCNMask()
    loss: MaskLoss = SigmoidMask()
    paste: Literal["pixel_centres", "torchvision"] = (
        "pixel_centres"  # of `predict_image`; torchvision rounds boxes
    )
    loss_weight: float = Field(1.0, gt=0)


Mask: TypeAlias = Annotated[NoMask | MaskBranch, Field(discriminator="kind")]


class NoKeypoints(Record):
    kind: Literal["none"] = "none"


class KeypointBranch(Record):
    """One-hot m x m targets per keypoint, cross-entropy over the m^2 positions (section 5)."""

    kind: Literal["keypoints"] = "keypoints"
    num_keypoints: int = Field(17, ge=1, le=10_000)
    convs: int = Field(8, ge=1, le=_MOST_LAYERS)
    width: int = Field(512, ge=8, le=_MOST_CHANNELS)
    half_pixel_px: float = Field(
        0.5, ge=0
    )  # taken off predictions; torchvision does not shift keypoints and has 0
    loss_weight: float = Field(1.0, gt=0)


Keypoints: TypeAlias = Annotated[NoKeypoints | KeypointBranch, Field(discriminator="kind")]


class ModelConfig(Record):
    """One detector. `mask` and `keypoints` choose the task."""

    num_classes: int = Field(
        80, ge=1, le=100_000
    )  # without background; must match the data's categories
    backbone: Backbone = ResNet()
    weights: Weights = TorchvisionWeights()
    image: ImageInput = ImageInput()
    layout: Layout = FPN()
    anchors: Anchors = Anchors()
    rpn: RPN = RPN()
    proposals: Proposals = EndToEnd()
    sampling: RoISampling = RoISampling()
    roi: RoIOp = RoIAlign()
    box_head: BoxHead = FCHead()
    class_agnostic_boxes: bool = False
    box_loss: BoxLoss = L1()
    box_loss_weight: float = Field(1.0, ge=0)  # of classes and boxes; 0 trains the RPN alone
    background: Literal["first", "last"] = "last"  # where the class logits keep the background
    inference: BoxInference = BoxInference()
    mask: Mask = MaskBranch()
    keypoints: Keypoints = NoKeypoints()

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        frozen = not isinstance(self.backbone, VGG16) and isinstance(
            self.backbone.norm, FrozenBatchNorm
        )
        if isinstance(self.weights, NoWeights) and (frozen or self.backbone.frozen_stages):
            what = (
                "frozen batch-norm"
                if frozen
                else f"backbone.frozen_stages = {self.backbone.frozen_stages}"
            )
            raise ValueError(
                f"{what} needs pretrained weights, weights.kind is 'none'; "
                "choose norm 'gn' and 0 stages"
            )
        group_norm = not isinstance(self.backbone, VGG16) and isinstance(
            self.backbone.norm, GroupNorm
        )
        if isinstance(self.weights, TorchvisionWeights) and group_norm:
            raise ValueError(
                "torchvision's ImageNet weights belong to batch-norm, backbone.norm.kind is 'gn'; "
                "choose 'frozen_bn' or 'bn', or weights.kind 'none', or a file of a network with "
                "group norm"
            )
        self._check_conventions()
        self._check_layout()
        self._check_heads()
        return self

    def _check_conventions(self) -> None:
        """The conventions without which a whole detector's weights mean nothing.

        Fine-tuning may change the others.
        """
        if not isinstance(self.weights, FileWeights) or self.weights.layout not in (
            "torchvision",
            "detectron2",
        ):
            return
        theirs = self.weights.layout == "detectron2"
        wanted: dict[str, tuple[object, object]] = {
            "background": (self.background, "last" if theirs else "first"),
            "image.channels": (self.image.channels, "bgr" if theirs else "rgb"),
        }
        if isinstance(self.backbone, ResNet):
            wanted["backbone.stride_in_1x1"] = (self.backbone.stride_in_1x1, theirs)
            if theirs:  # Caffe's ResNets saw pixels up to 255
                wanted["image.std"] = (self.image.std, (1.0, 1.0, 1.0))
        wrong = [
            f"{field} {needed!r}, not {given!r}"
            for field, (given, needed) in wanted.items()
            if given != needed
        ]
        if wrong:
            raise ValueError(
                f"weights.layout '{self.weights.layout}' needs {', '.join(wrong)}; "
                f"the presets that end in '-{self.weights.layout}' have it right"
            )

    def _check_layout(self) -> None:
        vgg, conv5 = isinstance(self.backbone, VGG16), isinstance(self.layout, Conv5)
        if vgg != conv5:
            raise ValueError(
                f"backbone '{self.backbone.kind}' cannot have layout '{self.layout.kind}': 'vgg16' "
                "has one stride-16 map, which is layout 'conv5', and only it has; residual "
                "networks take 'c4', 'c5' or 'fpn'"
            )
        levels = len(self.anchors.sizes_px)
        if isinstance(self.layout, FPN) and levels < len(self.layout.strides):
            raise ValueError(
                f"anchors.sizes_px has {levels} level(s), fewer than the "
                f"{len(self.layout.strides)} maps of the pyramid"
            )
        if not isinstance(self.layout, FPN) and levels != 1:
            raise ValueError(
                f"layout '{self.layout.kind}' has one RPN level, anchors.sizes_px has {levels}"
            )
        if len({len(sizes) for sizes in self.anchors.sizes_px}) != 1:
            raise ValueError(
                "anchors.sizes_px must have equally many sizes on every level: "
                "the RPN head is shared"
            )
        if isinstance(self.layout, C4) and self.backbone.frozen_stages > 4:
            raise ValueError(
                "backbone.frozen_stages = 5 would freeze res5, which is C4's RoI head; at most 4"
            )

    def _check_input_side(self, head: MLPMask) -> None:
        # After C4's res5 all heads read 7 x 7 cells.
        alone = isinstance(self.layout, C4) or isinstance(self.keypoints, NoKeypoints)
        if head.input_side != 14 and not alone:
            raise ValueError(
                f"mask.head.input_side = {head.input_side}: masks and keypoints read one crop, and "
                "keypoints read 14 x 14 cells; leave it out"
            )

    def _check_heads(self) -> None:
        if self.box_loss_weight == 0 and not isinstance(self.proposals, EndToEnd):
            raise ValueError(
                "box_loss_weight = 0 trains the RPN alone, and proposals.kind "
                f"{self.proposals.kind!r} has none; choose 'end_to_end', or a weight above 0"
            )
        if isinstance(self.layout, C4) != isinstance(self.box_head, Res5Head):
            raise ValueError(
                f"layout '{self.layout.kind}' cannot have box_head '{self.box_head.kind}': "
                "'res5' is C4's"
            )
        if isinstance(self.box_head, VGGHead) and not isinstance(self.backbone, VGG16):
            raise ValueError(
                "box_head 'vgg' is fc6 and fc7 of backbone 'vgg16'; other backbones take 'fc'"
            )
        if isinstance(self.mask, MaskBranch) and isinstance(self.mask.head, MLPMask):
            self._check_input_side(self.mask.head)
        if isinstance(self.mask, MaskBranch) and isinstance(self.mask.head, FCNMask):
            after_res5 = isinstance(self.layout, C4)
            if after_res5 and self.mask.head.convs:
                raise ValueError(
                    f"mask.head.convs = {self.mask.head.convs}: after C4's res5 the mask head has "
                    "0 (Fig. 4, left)"
                )
