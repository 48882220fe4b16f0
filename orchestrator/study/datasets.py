"""What a study needs to know of its datasets before anything runs: does the model fit them?"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from contract.data import MANIFEST_NAME, ManifestHeader
from contract.files import Files, uri_join
from contract.fit import Category, categories_of
from orchestrator.client import Client, configured
from orchestrator.study.baseline import UNSET


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
    raw = _read(uri, field, place)
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
        categories = categories_of(header)
    except ValueError as error:
        # The first line alone: an error of pydantic has many.
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field}: {place}: {reason}") from None
    return Manifest(uri, hashlib.sha256(raw).hexdigest(), header, categories)


def _read(uri: str, field: str, place: str) -> bytes | None:
    """The manifest's bytes, from here or else through the service of MASKRAY_SERVER.

    A laptop may have neither the cluster's disks nor a login to its store.
    """
    problem = ""
    try:
        raw = Files(uri).read_part(MANIFEST_NAME)
    except (OSError, ValueError) as error:
        raw, problem = None, f"{field}: {place} cannot be read: {error}"
    connection = configured(os.environ)
    if raw is None and connection is not None:
        try:
            with Client(connection) as client:
                return client.manifest(uri)
        except ValueError as error:
            raise ValueError(f"{field}: {uri} is not here, and the service says: {error}") from None
    if problem:
        raise ValueError(problem)
    return raw
