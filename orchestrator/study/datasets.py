"""What a study needs to know of its datasets before anything runs: their manifests, and whether the model fits them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from contract.data import MANIFEST_NAME, ManifestHeader
from contract.files import Files, join
from contract.model import KeypointBranch, MaskBranch
from contract.recipe import RunConfig
from contract.record import nearest
from orchestrator.study.read import UNSET


@dataclass(frozen=True)
class Manifest:
    """The header of a dataset's manifest and the SHA-256 of all its bytes, which cover every shard's hash."""

    uri: str
    hash: str
    header: ManifestHeader

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(str(category["name"]) for category in self.header.categories)


def absolute(uri: str, root: Path) -> str:
    """A local path as seen from `root`; a URI with a scheme as it is."""
    return uri if "://" in uri or uri == UNSET else str((root / Path(uri).expanduser()).resolve())


def read_manifest(uri: str, field: str) -> Manifest:
    """Raises ValueError, naming `field`, if there is none or it is not one of ours."""
    if uri == UNSET:
        raise ValueError(
            f"{field}: no dataset; give --data DIR (with DIR/train and DIR/val) or set {field} in the study"
        )
    place = join(uri, MANIFEST_NAME)
    try:
        raw = Files(uri).read_part(MANIFEST_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: {place} cannot be read: {error}") from None
    if raw is None and "://" not in uri and (Path(uri).parent / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{field}: {uri} is inside a packed dataset; give --data the folder that holds 'train' and 'val'"
        )
    if raw is None:
        raise ValueError(
            f"{field}: {uri} has no {MANIFEST_NAME}; pack the data with 'maskray data pack'"
        )
    try:
        header = ManifestHeader.parse(raw)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field}: {place}: {reason}") from None
    return Manifest(uri, hashlib.sha256(raw).hexdigest(), header)


def check_fit(run: RunConfig, train: Manifest, val: Manifest) -> None:
    """Raises ValueError with the remedy where the model asks for what the data does not hold."""
    if train.categories != val.categories:
        raise ValueError(
            f"data.val: {val.uri} has other categories than data.train ({_listed(val.categories)}; "
            f"{_listed(train.categories)}); pack both from annotations with the same categories"
        )
    for field, manifest in (("data.train", train), ("data.val", val)):
        if manifest.header.num_images == 0:
            raise ValueError(f"{field}: {manifest.uri} has no images")
    wanted = run.data.filter.categories
    for name in wanted:
        if name not in train.categories:
            raise ValueError(
                f"data.filter.categories: the data has no category {name!r}; {nearest(name, train.categories)}"
            )
    kept = len(set(wanted)) if wanted else len(train.categories)
    if run.model.num_classes != kept:
        after = " after data.filter.categories" if wanted else ""
        raise ValueError(
            f"model.num_classes: is {run.model.num_classes}, the data has {kept} categories{after} "
            f"({_listed(wanted or train.categories)}); set 'model.num_classes: {kept}' in baseline.set"
        )
    _check_targets(run, (("data.train", train), ("data.val", val)))


def _check_targets(run: RunConfig, manifests: tuple[tuple[str, Manifest], ...]) -> None:
    for field, manifest in manifests:
        if isinstance(run.model.mask, MaskBranch) and not manifest.header.has_masks:
            raise ValueError(
                f"model.mask: {field} ({manifest.uri}) has no masks; set 'model.mask.kind: none'"
            )
        if not isinstance(run.model.keypoints, KeypointBranch):
            continue
        if not manifest.header.has_keypoints:
            raise ValueError(
                f"model.keypoints: {field} ({manifest.uri}) has no keypoints; pack it with keypoint annotations, "
                "or set 'model.keypoints.kind: none'"
            )
        counts = {len(c["keypoints"]) for c in manifest.header.categories if c.get("keypoints")}
        if counts and run.model.keypoints.num_keypoints not in counts:
            found = ", ".join(str(count) for count in sorted(counts))
            raise ValueError(
                f"model.keypoints.num_keypoints: is {run.model.keypoints.num_keypoints}, "
                f"{field} ({manifest.uri}) has {found}"
            )


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ..." if len(names) > 4 else shown
