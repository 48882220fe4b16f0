"""Generated odd datasets through `pack` and `verify`: no traceback, and no object lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from pipelines.coco.checks import whole
from pipelines.inspect.verify import verify
from pipelines.pack.pack import Packed, PackOptions, pack
from pipelines.pack.whole import SKIPPED_NAME
from pipelines.shards.dataset import open_dataset
from tests.pipelines.odd_coco import fuzzed, odd_coco, write_case, write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder / "images")
    return folder


def packed_or_told(place: Path, path: Path, **options: Any) -> Packed | None:
    """None where `pack` refuses the files in one line that says something."""
    out = str(path.parent / "packed")
    try:
        return pack([path], str(place / "images"), out, PackOptions(**options))
    except ValueError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None


def identity(annotation: dict[str, Any]) -> list[Any]:
    return [whole(annotation.get(name)) for name in ("id", "image_id", "category_id", "bbox")]


@given(coco=odd_coco())
@fuzzed(few=60)
def test_what_goes_in_comes_out_or_is_named(place: Path, coco: dict[str, Any]) -> None:
    path = write_case(place / "case", coco)
    strict = packed_or_told(place, path)
    lenient = packed_or_told(place, path, on_error="skip") if strict is None else strict
    if lenient is None:
        return
    folder = path.parent / "packed"
    assert verify(str(folder)).errors == ()
    skipped = folder / SKIPPED_NAME
    problems = json.loads(skipped.read_text()) if skipped.exists() else []
    assert (strict is None) == bool(problems)
    by_kind = {kind: [p for p in problems if p["kind"] == kind] for kind in ("image", "annotation")}
    manifest = lenient.manifest
    assert manifest.num_images + len(by_kind["image"]) == len(coco["images"])
    with_images = sum(problem["annotations"] for problem in by_kind["image"])
    lost = len(by_kind["annotation"]) + with_images
    assert manifest.num_annotations + lost == len(coco["annotations"])
    back = open_dataset(str(folder)).coco()
    assert len(back["annotations"]) == manifest.num_annotations
    written = [identity(a) for a in coco["annotations"] if isinstance(a, dict)]
    assert all(identity(annotation) in written for annotation in back["annotations"])
    json.dumps(back, allow_nan=False)
