"""What a run reads: two packed datasets and how their samples are drawn, resized and augmented."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from contract.record import Record

MANIFEST_NAME = "manifest.json"

SCHEMA_VERSION = 1


class Filter(Record):
    """Which annotations and images of the packed data a run sees. Part of the run's identity."""

    categories: tuple[str, ...] = ()  # names; empty keeps all
    require_keypoints: bool = False  # only images with a labelled keypoint; all their objects train
    min_area_px: float = Field(0.0, ge=0)  # in pixels of the image file
    holdout: float = Field(
        0.0, ge=0, lt=1
    )  # fraction of the training images set aside for tuning, by id hash
    drop_empty: bool = True  # training leaves out images without a usable object


class ColourJitter(Record):
    """Strengths as in torchvision's ColorJitter; 0 leaves the property alone."""

    brightness: float = Field(0.0, ge=0)
    contrast: float = Field(0.0, ge=0)
    saturation: float = Field(0.0, ge=0)


class DataConfig(Record):
    """Training and validation shards and the path from a stored image to a padded batch.

    The test-time image size belongs to the model (`model.image`); the training scales are here.
    """

    train: str = Field(min_length=1)  # folder or pyarrow.fs URI with a manifest
    val: str = Field(min_length=1)
    short_sides_px: tuple[int, ...] = Field((800,), min_length=1)  # one is drawn per sample
    max_side_px: int = Field(1333, ge=32)
    canvas_multiple_px: int = Field(
        32, ge=1
    )  # canvas sides are multiples of this; larger means fewer shapes
    # 0 gives each training batch its smallest canvas; otherwise at most so many are chosen from the
    # data, and batches are padded to them (for CUDA graphs and `compile`)
    num_canvases: int = Field(0, ge=0)
    flip_probability: float = Field(0.5, ge=0, le=1)
    # keypoints that change places in a mirrored image; None finds them by the sides in their names
    flip_pairs: tuple[tuple[str, str], ...] | None = None
    # of OKS, one a keypoint; empty takes COCO's for 17 keypoints, else the mean of COCO's for each
    oks_sigmas: tuple[float, ...] = ()
    colour: ColourJitter = ColourJitter()
    filter: Filter = Filter()
    shuffle_window_shards: int = Field(16, ge=1)
    bucket_batches: int = Field(32, ge=1)  # global batches sorted together by aspect ratio
    mask_crop_side: int = Field(112, ge=14)
    num_loader_workers: int = Field(2, ge=0)  # per rank; 0 loads in the training process
    cache_gib: float = Field(20.0, gt=0)  # cap of the node's cache of remote shards

    @field_validator("short_sides_px")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 16:
            raise ValueError(f"sides must be at least 16 px, one is {min(value)}")
        return value


class OtherSchemaError(ValueError):
    """A whole manifest, but of a schema that this version does not read."""


class ManifestHeader(BaseModel):
    """The part of `manifest.json` that others than the reader need; the rest is the reader's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    num_images: int
    num_annotations: int
    num_shards: int
    # COCO category records, in the order of their dense labels
    categories: tuple[dict[str, Any], ...]
    has_masks: bool
    has_keypoints: bool

    @classmethod
    def parse(cls, text: str | bytes) -> ManifestHeader:
        """Raises ValueError if the text is no manifest, OtherSchemaError for another schema."""
        try:
            header = cls.model_validate(json.loads(text))
        except ValueError as error:  # pydantic's errors are ValueErrors too
            raise ValueError(
                "not a readable manifest; restore it, or pack the data again"
            ) from error
        if header.schema_version != SCHEMA_VERSION:
            raise OtherSchemaError(
                f"manifest has schema {header.schema_version}, this version reads "
                f'{SCHEMA_VERSION}; pack the data again with "maskray data pack"'
            )
        return header
