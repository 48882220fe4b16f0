"""`manifest.json`: what the shards hold, with a checksum for each of them and one for itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from contract.data import MANIFEST_NAME, ManifestHeader, OtherSchemaError
from contract.files import Files
from pipelines.coco.checks import read_category
from pipelines.coco.records import CocoCategory

INDEX_NAME = "index.arrow"


class FileEntry(BaseModel):
    """One file of a packed dataset."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    bytes: int
    rows: int


class Manifest(ManifestHeader):
    """The whole manifest. `source` identifies the packed inputs.

    It holds no time and no machine, so that equal inputs give equal bytes everywhere.
    """

    shards: tuple[FileEntry, ...]
    index: FileEntry
    num_skipped: int
    source: str
    info: dict[str, Any] = {}
    licenses: tuple[dict[str, Any], ...] = ()

    def dump(self) -> bytes:
        """The bytes of the file: one canonical text, so that any changed byte is noticed."""
        content = json.loads(self.model_dump_json())
        # Of the content with sorted keys: the checksum does not depend on the order of the fields.
        checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        content |= {"checksum": checksum}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def hash(self) -> str:
        """SHA-256 of the bytes of `manifest.json`, in hex."""
        return hashlib.sha256(self.dump()).hexdigest()

    @property
    def header(self) -> ManifestHeader:
        """The part that others than the reader need."""
        return ManifestHeader(**{name: getattr(self, name) for name in ManifestHeader.model_fields})

    @property
    def coco_categories(self) -> tuple[CocoCategory, ...]:
        """The categories as records; their position is the dense label."""
        return tuple(read_category(fields) for fields in self.categories)

    @property
    def num_keypoints(self) -> int:
        """Keypoint types of the category that has most, 0 without keypoints."""
        counts = [len(category.keypoints) for category in self.coco_categories]
        return max(counts, default=0) if self.has_keypoints else 0


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Raises ValueError for a manifest of another schema, RuntimeError for a damaged one."""
    try:
        ManifestHeader.parse(text)
        manifest = Manifest.model_validate_json(text)
    # The header first: a manifest of another schema is no damaged one.
    except OtherSchemaError as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeError(
            f"{where}: not a readable manifest; restore it or pack the data again"
        ) from error
    # Not the checksum alone: a field that the record does not know, or another layout, shows too.
    if manifest.dump() != text:
        raise RuntimeError(
            f"{where}: was changed after packing (its checksum differs); restore it or pack again"
        )
    return manifest


def read_manifest(store: Files) -> Manifest:
    """Raises ValueError with the remedy if there is no packed dataset."""
    if store.local is not None and store.local.is_file():
        raise ValueError(f"{store.name}: is a file; give the folder that holds {MANIFEST_NAME}")
    where = store.describe(MANIFEST_NAME)
    try:
        text = store.read(MANIFEST_NAME)
    except FileNotFoundError:
        raise ValueError(
            f"{store.name}: no {MANIFEST_NAME} there; pack the data first with "
            f'"maskray data pack --out {store.name}"'
        ) from None
    except IsADirectoryError:
        raise RuntimeError(
            f"{where}: is a folder; restore the file or pack the data again"
        ) from None
    return parse_manifest(text, where)
