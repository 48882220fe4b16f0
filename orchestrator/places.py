"""Where a service keeps what must outlive it: beside the trials, not in the folder of its own files."""

from __future__ import annotations

from pathlib import Path

from orchestrator import storage
from orchestrator.config import ServiceSettings


def storage_root(settings: ServiceSettings) -> str:
    """Folder or URI under which each study has its folder."""
    return settings.storage or str(Path(settings.home) / "studies")


def code_uri(settings: ServiceSettings, sha256: str) -> str:
    """The zip of sources of this hash."""
    return storage.join(storage_root(settings), ".code", f"{sha256}.zip")
