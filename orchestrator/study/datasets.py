"""What a study needs to know of its datasets before anything runs: does the model fit them?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from contract.data import MANIFEST_NAME, ManifestHeader
from contract.files import Files, uri_join
from contract.model import KeypointBranch, MaskBranch
from contract.recipe import RunConfig
from contract.record import Message, nearest
from orchestrator.study.baseline import UNSET


class Category(Message):
    """What the checks need of a COCO category; its other fields are the dataset's own."""

    name: str
    keypoints: tuple[str, ...] | None = None  # None in a dataset without keypoints


_CATEGORIES = TypeAdapter(tuple[Category, ...])


@dataclass(frozen=True)
class Manifest:
    """The header of a dataset's manifest.

    hash: the SHA-256 of all its bytes, which cover the hash of every shard.
    """

    uri: str
    hash: str
    header: ManifestHeader
    categories: tuple[Category, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)


def read_manifest(uri: str, field: str) -> Manifest:
    """Raises ValueError, naming `field`, if there is none or it is not one of ours."""
    if uri == UNSET:
        raise ValueError(
            f"{field}: no dataset; give --data DIR (with DIR/train and DIR/val) "
            f"or set {field} in the study"
        )
    place = uri_join(uri, MANIFEST_NAME)
    try:
        raw = Files(uri).read_part(MANIFEST_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: {place} cannot be read: {error}") from None
    # People give the folder of one split to --data, which then looks for `train/train`.
    if raw is None and "://" not in uri and (Path(uri).parent / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{field}: {uri} is inside a packed dataset; "
            "give --data the folder that holds 'train' and 'val'"
        )
    if raw is None:
        raise ValueError(
            f"{field}: {uri} has no {MANIFEST_NAME}; pack the data with 'maskray data pack'"
        )
    try:
        header = ManifestHeader.parse(raw)
        categories = _CATEGORIES.validate_python(header.categories)
    except ValueError as error:
        # The first line alone: an error of pydantic has many.
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field}: {place}: {reason}") from None
    return Manifest(uri, hashlib.sha256(raw).hexdigest(), header, categories)


def check_fit(run: RunConfig, train: Manifest, val: Manifest) -> None:
    """Raises ValueError with the remedy where the model asks for what the data does not hold."""
    if train.names != val.names:
        # A label is a category's position, so the same names in another order do not fit either.
        raise ValueError(
            f"data.val: {val.uri} has other categories than data.train ({_listed(val.names)}; "
            f"{_listed(train.names)}); pack both from annotations with the same categories"
        )
    for field, manifest in (("data.train", train), ("data.val", val)):
        if manifest.header.num_images == 0:
            raise ValueError(f"{field}: {manifest.uri} has no images")
    wanted = run.data.filter.categories
    for name in wanted:
        if name not in train.names:
            raise ValueError(
                f"data.filter.categories: the data has no category {name!r}; "
                f"{nearest(name, train.names)}"
            )
    kept = len(set(wanted)) if wanted else len(train.names)
    if run.model.num_classes != kept:
        after = " after data.filter.categories" if wanted else ""
        raise ValueError(
            f"model.num_classes: is {run.model.num_classes}, the data has {kept} categories{after} "
            f"({_listed(wanted or train.names)}); set 'model.num_classes: {kept}' in baseline.set"
        )
    for field, manifest in (("data.train", train), ("data.val", val)):
        _check_targets(run, field, manifest)


def _check_targets(run: RunConfig, field: str, manifest: Manifest) -> None:
    """The branches of the model have annotations to learn from and to be evaluated on."""
    if isinstance(run.model.mask, MaskBranch) and not manifest.header.has_masks:
        raise ValueError(
            f"model.mask: {field} ({manifest.uri}) has no masks; set 'model.mask.kind: none'"
        )
    if not isinstance(run.model.keypoints, KeypointBranch):
        return
    if not manifest.header.has_keypoints:
        raise ValueError(
            f"model.keypoints: {field} ({manifest.uri}) has no keypoints; "
            "pack it with keypoint annotations, or set 'model.keypoints.kind: none'"
        )
    # A manifest may say that it has keypoints and not name them; then there is nothing to compare.
    counts = {len(category.keypoints) for category in manifest.categories if category.keypoints}
    if counts and run.model.keypoints.num_keypoints not in counts:
        listed = ", ".join(str(count) for count in sorted(counts))
        raise ValueError(
            f"model.keypoints.num_keypoints: is {run.model.keypoints.num_keypoints}, "
            f"{field} ({manifest.uri}) has {listed}"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ..." if len(names) > 4 else shown
