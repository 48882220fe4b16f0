from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise

# A busy machine must not fail a test, and a failure must come again.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """50 synthetic images of 64 px with keypoints: 40 to train on (8 shards), 10 to validate."""
    folder = tmp_path_factory.mktemp("shapes")
    synthesise(folder, num_images=50, size=64, seed=3, keypoints=True)
    for split, shard_mib in (("train", 0.008), ("val", 64)):
        annotations = [folder / "annotations" / f"instances_{split}.json"]
        pack(
            annotations,
            str(folder / "images" / split),
            str(folder / split),
            PackOptions(shard_mib=shard_mib),
        )
    return folder


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    folder = Path(
        os.environ.get("MASKRAY_COCO_MINI", ROOT.parent / "shared" / "data" / "coco-mini")
    )
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no real COCO images: {folder} does not exist; set MASKRAY_COCO_MINI")
    return folder
