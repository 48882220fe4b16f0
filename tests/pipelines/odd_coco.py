"""Odd COCO datasets, generated: what annotation tools and people write, sound and not."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle_tools

from tests.pipelines.tiny_coco import noise_image

Json = Any


def fuzzed(few: int, share: float = 1.0) -> settings:
    """`few` examples, the same each time; MASKRAY_FUZZ=3000 asks for that share of 3,000, new ones.

    Each example writes its own folder, so no example may be judged by its time.
    """
    asked = os.environ.get("MASKRAY_FUZZ")
    return settings(
        max_examples=int(int(asked) * share) if asked else few,
        derandomize=not asked,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --- image files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """What lies on disk, and the size that its pixels have as they are stored."""

    name: str
    content: bytes
    width: int
    height: int


def _saved(image: Image.Image, kind: str, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **fields)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _sixteen_bits(brightest: int) -> Image.Image:
    values = np.linspace(0, brightest, 48 * 32).reshape(32, 48).astype(np.uint16)
    return Image.fromarray(values)


@cache
def sound_files() -> tuple[ImageFile, ...]:
    """Files of every kind that `pack` reads, the smallest of one pixel."""
    image = noise_image(48, 32)
    made: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        ("plain.jpg", image, "JPEG", {}),
        ("progressive.jpg", image, "JPEG", {"progressive": True}),
        ("grey.jpg", image.convert("L"), "JPEG", {}),
        ("four.jpg", image.convert("CMYK"), "JPEG", {}),
        ("pixel.jpg", noise_image(1, 1), "JPEG", {}),
        ("column.jpg", noise_image(1, 40), "JPEG", {}),
        ("plain.png", image, "PNG", {}),
        ("alpha.png", image.convert("RGBA"), "PNG", {}),
        ("grey alpha.png", image.convert("LA"), "PNG", {}),
        ("palette.png", image.convert("P"), "PNG", {"transparency": 0}),
        ("bits.png", image.convert("1"), "PNG", {}),
        ("sub/deep/grey.png", image.convert("L"), "PNG", {}),
        ("twelve.png", _sixteen_bits(4000), "PNG", {}),
        ("sixteen.png", _sixteen_bits(65000), "PNG", {}),
        ("pixel.png", noise_image(1, 1), "PNG", {}),
        ("row.png", noise_image(50, 1), "PNG", {}),
        ("jpeg inside.png", image, "JPEG", {}),
        ("ünï%20code.jpg", image, "JPEG", {}),
        ("turned.png", image, "PNG", {"exif": _turned(6)}),
        *((f"exif{k}.jpg", image, "JPEG", {"exif": _turned(k)}) for k in (0, 1, 2, 3, 6, 8, 9)),
    ]
    files = [
        ImageFile(name, _saved(picture, kind, **fields), *picture.size)
        for name, picture, kind, fields in made
    ]
    plain = files[0].content
    return (*files, ImageFile("stray.jpg", plain[:-2] + bytes(5) + plain[-2:], 48, 32))


@cache
def broken_files() -> tuple[ImageFile, ...]:
    """Files that no training can use."""
    plain = sound_files()[0].content
    contents = {
        "short.jpg": plain[: len(plain) // 2],
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "head.png": b"\x89PNG\r\n\x1a\n",
        "film.gif": _saved(noise_image(48, 32), "GIF"),
    }
    return tuple(ImageFile(name, content, 48, 32) for name, content in contents.items())


def write_images(folder: Path) -> None:
    """All files, once for all examples."""
    for file in (*sound_files(), *broken_files()):
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)


# --- values ---------------------------------------------------------------------------------------

_LONG = 1 << 70
junk = st.sampled_from(
    [
        None, True, "", "7", "\ud800", [], [[]], [None], {}, {"a": 1}, -1, 0, 2.5, -0.0, 1e300,
        _LONG, float("nan"), float("inf"), [1e300, 1, 2, 3], ["x"], "line\nbreak", [[1, 2]],
    ]
)  # fmt: skip
odd_names = st.sampled_from(
    ["cat", "dog", "", " ", ".", "..", "a/b", "a:b", "rate (x2)", "Ä\u202e", "line\nbreak",
     "x" * 300, "'quoted\"", "background", "\U0001f408", "%s{}", "__proto__"]
)  # fmt: skip
odd_ids = st.one_of(
    st.integers(0, 12),
    st.sampled_from([0, -1, 1.0, 7.0, 7.5, "3", None, True, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
                     -(2**63)]),
)  # fmt: skip


odd_masks = st.sampled_from(
    [
        [[1, 1, 5, 5]], [[1, 1, 5, 5, 9, 9, 2]], [1, 1, 5, 1, 5, 5], [[1, 1, 5, 1, "5", 5]],
        [[-50, -50, -40, -50, -40, -40]], [[1, 1, 1e9, 1, 5, 9]], [[1, 1, 400, 1, 5, 9]],
        [[float("nan"), 1, 5, 1, 5, 5]], [[1, 1, 5, 1, 5, 5], []], [[True] * 6], [[[1, 1], [5, 1]]],
        {"size": [32, 48], "counts": ""}, {"size": [32, 48], "counts": []},
        {"size": [32, 48], "counts": [1536]}, {"size": [32, 48], "counts": [0, 1536]},
        {"size": [32, 48], "counts": [10, -5, 1531]}, {"size": [32.0, 48.0], "counts": [0, 1536]},
        {"size": [48, 32], "counts": [0, 1536]}, {"size": [32, 48], "counts": [0, 1 << 40]},
        {"size": [32, 48], "counts": "0" * 50}, {"size": [32, 48], "counts": "\ud800"},
        {"size": [32, 48], "counts": [0.0, 1536.0]}, {"size": None, "counts": [1]}, {"counts": "x"},
        {"size": [1, 1], "counts": [0, 1]}, {"size": [32, 48], "counts": "PP1"},
    ]
)  # fmt: skip
odd_boxes = st.sampled_from(
    [
        [5, 5, -1, 5], [-9, 3, 2, 2], [99, 99, 5, 5], [0, 0, 48, 32], [0, 0, 1e15, 1],
        [0.5, 0.5, 5e-324, 5e-324], [float("nan")] * 4, [1, 2, 3], [1, 2, 3, 4, 5], [True, 1, 2, 3],
        ["1", 1, 2, 3], [47.999999, 31.999999, 1e-6, 1e-6], [-1e-300, 0, 2e-300, 5], [0, 0, 1, 1],
        [0, 0, 1e16, 1],
    ]
)  # fmt: skip


def rarely(draw: Callable[..., Any], one_in: int) -> bool:
    return bool(draw(st.integers(1, one_in)) == one_in)


def _polygon(draw: Callable[..., Any], x: float, y: float, w: float, h: float) -> list[float]:
    kind = draw(st.sampled_from(["square", "triangle", "flat", "point", "open", "spiky"]))
    match kind:
        case "square":
            return [x, y, x + w, y, x + w, y + h, x, y + h]
        case "triangle":
            return [x, y, x + w, y + h, x, y + h]
        case "flat":
            return [x, y, x + w / 2, y + h / 2, x + w, y + h]
        case "point":
            return [x, y] * 3
        case "open":
            return [x, y, x + w, y, x + w, y + h, x, y + h, x, y]
        case _:
            return [x, y, x + w, y + h, x + w, y, x, y + h]


def _mask(width: int, height: int, box: tuple[float, ...]) -> np.ndarray:
    x, y, w, h = (int(value) for value in box)
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[max(y, 0) : max(y + h, y + 1, 0), max(x, 0) : max(x + w, x + 1, 0)] = 1
    return mask


def _run_lengths(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _segmentation(
    draw: Callable[..., Any], width: int, height: int, box: tuple[float, ...]
) -> Json:
    kind = draw(st.sampled_from(["polygons", "two", "text", "counts", "none", "empty", "nested"]))
    match kind:
        case "polygons":
            return [_polygon(draw, *box)]
        case "two":
            return [_polygon(draw, *box), _polygon(draw, *box)]
        case "text":
            coded = rle_tools.encode(_mask(width, height, box))
            return {"size": [height, width], "counts": coded["counts"].decode()}
        case "counts":
            runs = _run_lengths(_mask(width, height, box))
            return {"size": [height, width], "counts": runs}
        case "none":
            return None
        case "empty":
            return []
        case _:
            return [[]]


def _keypoints(draw: Callable[..., Any], count: int, width: int, height: int) -> list[float]:
    points: list[float] = []
    for _ in range(count):
        v = draw(st.sampled_from([0, 1, 2, 2.0]))
        points += (
            [draw(st.integers(-1, width)), draw(st.integers(0, height)), v] if v else [0, 0, 0]
        )
    return points


def _annotation(
    draw: Callable[..., Any], id: Json, image: dict[str, Json], category: dict[str, Json]
) -> dict[str, Json]:
    width, height = image["width"], image["height"]
    x, y = (draw(st.floats(-0.125, 0.875, width=32)) * side for side in (width, height))
    w, h = (
        draw(st.sampled_from([0.0, 1e-9, 0.4, 1.0, 0.3 * side, 0.3 * side, 0.3 * side, 1.5 * side]))
        for side in (width, height)
    )
    made: dict[str, Json] = {
        "id": id,
        "image_id": image["id"],
        "category_id": category["id"],
        "bbox": [x, y, w, h],
        "area": draw(st.sampled_from([w * h, w * h, 0, 0.5, 1e9])),
        "iscrowd": draw(st.sampled_from([0, 0, 0, 0, 1, 1.0, True, False])),
        "segmentation": _segmentation(draw, width, height, (x, y, w, h)),
    }
    names = category.get("keypoints")
    if rarely(draw, 6):
        made["segmentation"] = draw(odd_masks)
    if rarely(draw, 10):
        made["bbox"] = draw(odd_boxes)
    if count := len(names) if isinstance(names, list) else 0:
        more = draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1]))
        made["keypoints"] = _keypoints(draw, count + more, width, height)
        made["num_keypoints"] = sum(v > 0 for v in made["keypoints"][2::3])
    return made


def _oddly(draw: Callable[..., Any], record: dict[str, Json], one_in: int) -> Json:
    """The record, now and then with a field that is junk or missing, or no record at all."""
    if not rarely(draw, one_in):
        return record
    if rarely(draw, 8):
        return draw(junk)
    name = draw(st.sampled_from(sorted(record)))
    if draw(st.booleans()):
        return {key: value for key, value in record.items() if key != name}
    return record | {name: draw(st.one_of(junk, odd_ids) if name.endswith("id") else junk)}


def _images(draw: Callable[..., Any], one_in: int) -> list[dict[str, Json]]:
    chosen = draw(st.lists(st.sampled_from(sound_files()), min_size=1, max_size=5))
    records = []
    for number, file in enumerate(chosen, 1):
        swapped = "exif" in file.name and draw(st.booleans())
        width, height = (file.height, file.width) if swapped else (file.width, file.height)
        record = {"id": number, "file_name": file.name, "width": width, "height": height}
        if rarely(draw, one_in):
            record["file_name"] = draw(
                st.sampled_from(
                    [*(broken.name for broken in broken_files()), "gone.jpg", "../x.jpg", "sub",
                     "sub\\deep\\grey.png", "grey%20alpha.png", "/abs/plain.jpg", ".", "a\0b",
                     "plain.jpg/", "./plain.jpg", "x" * 300 + ".jpg", "\ud800.jpg"]
                )
            )  # fmt: skip
        records.append(record)
    return records


def _categories(draw: Callable[..., Any], one_in: int) -> list[dict[str, Json]]:
    names = draw(st.lists(odd_names, min_size=1, max_size=4))
    records: list[dict[str, Json]] = []
    for number, name in enumerate(names):
        record: dict[str, Json] = {"id": number, "name": name, "supercategory": "none"}
        count = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 17]))
        if count:
            record["keypoints"] = [f"p{k}" for k in range(count)]
            if draw(st.booleans()):
                record["flip_pairs"] = [["p0", "p1"]] if count > 1 else []
        if rarely(draw, one_in):
            field = draw(st.sampled_from(["id", "keypoints", "flip_pairs", "skeleton"]))
            record[field] = draw(odd_ids if field == "id" else junk)
        records.append(record)
    return records


@st.composite
def odd_coco(draw: Callable[..., Any], one_in: int = 6, fewest: int = 0) -> dict[str, Json]:
    """A COCO file over the files of `write_images`; one record in `one_in` is odd in its form.

    fewest: annotations.
    """
    images, categories = _images(draw, 2 * one_in), _categories(draw, 8 * one_in)
    annotations = []
    for number in range(draw(st.integers(fewest, 12))):
        image, category = draw(st.sampled_from(images)), draw(st.sampled_from(categories))
        id = number if not rarely(draw, one_in) else draw(odd_ids)
        annotations.append(_oddly(draw, _annotation(draw, id, image, category), one_in))
    coco: dict[str, Json] = {
        "images": [_oddly(draw, image, 3 * one_in) for image in images],
        "annotations": annotations,
        "categories": categories,
    }
    if rarely(draw, 4 * one_in):
        coco[draw(st.sampled_from([*coco, "info", "licenses"]))] = draw(junk)
    return coco


def write_case(folder: Path, coco: dict[str, Json]) -> Path:
    """The annotation file, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "odd.json"
    path.write_text(json.dumps(coco))
    return path
