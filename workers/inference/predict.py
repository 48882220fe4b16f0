"""Image files to COCO results and pictures. What cannot be read is told, and the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from contract.record import Message
from pipelines.coco.decoding import Exif, read_header
from pipelines.load.images import decode
from workers.inference.trained import Trained
from workers.training.pictures import Drawable, drawn
from workers.training.results import CocoResult, Results, coco_results

ExifRule: TypeAlias = Literal["auto", "apply", "ignore"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
_MAX_SIDE_PX = 1600  # of a picture
_TEXT_PART = 60  # a picture's long side is so many heights of its text
_LEAST_TEXT_PX = 12


class ImageRecord(Message):
    """An element of `images` in a COCO file."""

    id: int
    file_name: str
    width: int
    height: int


class _Annotations(Message):
    images: tuple[ImageRecord, ...]


@dataclass(frozen=True)
class Predicted:
    """One image: its record, and its COCO results by kind."""

    path: Path
    image: ImageRecord
    pixels: Tensor
    results: Results


@dataclass(frozen=True)
class Bad:
    """An image that was not predicted, and why."""

    path: Path
    error: str


@dataclass
class Summary:
    """What became of all images. turned: by their EXIF orientation."""

    images: list[ImageRecord] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    results: Results = field(default_factory=dict)
    turned: int = 0


def image_files(arguments: Sequence[Path], pictures: Path) -> list[Path]:
    """The files, and of a folder its JPEG and PNG files in the order of their names.

    pictures: the folder to write to; what an earlier call left there is no input. Raises ValueError
    for a folder that has no image.
    """
    files: list[Path] = []
    written = pictures.resolve()
    for path in arguments:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in _SUFFIXES
            and file.is_file()
            and not file.resolve().is_relative_to(written)
        )
        if not inside:
            raise ValueError(
                f"{path}: no image in this folder ({', '.join(_SUFFIXES)}) outside {pictures}"
            )
        files += inside
    return list(dict.fromkeys(files))


def known_images(annotations: Path | None) -> dict[str, ImageRecord]:
    """The images of a COCO file by name. Raises ValueError if it is none."""
    if annotations is None:
        return {}
    try:
        read = TypeAdapter(_Annotations).validate_json(annotations.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"--annotations {annotations}: no COCO file ({where}: {first['msg']}); it needs "
            "'images' with id, file_name, width and height"
        ) from None
    return {image.file_name: image for image in read.images}


def predictions(
    trained: Trained,
    files: Sequence[Path],
    known: Mapping[str, ImageRecord],
    exif: ExifRule,
    summary: Summary,
) -> Iterator[Predicted | Bad]:
    """Each file in its order; `summary` gathers what the caller writes at the end.

    known: gives the ids where it is not empty; else images are numbered from 1.
    """
    device = next(trained.detector.parameters()).device
    ids = [category.id for category in trained.categories]
    taken: dict[int, Path] = {}
    for number, path in enumerate(files, start=1):
        try:
            record = _known(path, known)
            if record is not None and record.id in taken:
                raise ValueError(f"is image {record.id} of --annotations, as {taken[record.id]} is")
            pixels, turned = _read(path, record, exif)
        except (OSError, RuntimeError, ValueError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            summary.bad.append(Bad(path, reason))
            yield summary.bad[-1]
            continue
        if record is not None:
            taken[record.id] = path
        height, width = pixels.shape[-2:]
        image = ImageRecord(
            id=record.id if record else number,
            file_name=record.file_name if record else str(path),
            width=width,
            height=height,
        )
        detections = trained.detector.detect_image(pixels.to(device), image.id)
        results = coco_results(trained.model, detections, ids)
        summary.turned += turned
        summary.images.append(image)
        for kind, of_kind in results.items():
            summary.results.setdefault(kind, []).extend(of_kind)
        yield Predicted(path, image, pixels, results)


def picture(trained: Trained, predicted: Predicted, min_score: float) -> Image.Image:
    """The image with its detections of at least that score, the best on top."""
    names = {category.id: category.name for category in trained.categories}
    things = [Drawable.model_validate(r) for r in _joined(predicted.results)]
    shown = sorted((t for t in things if (t.score or 0) >= min_score), key=lambda t: t.score or 0)
    side = min(max(predicted.image.width, predicted.image.height), _MAX_SIDE_PX)
    pixels = np.ascontiguousarray(predicted.pixels.permute(1, 2, 0).numpy())
    text_px = max(side // _TEXT_PART, _LEAST_TEXT_PX)
    return Image.fromarray(drawn(pixels, shown, names, _MAX_SIDE_PX, text_px))


def _joined(results: Results) -> list[CocoResult]:
    """Each object with its box, and its mask and keypoints where it has them."""
    kinds = [results[kind] for kind in ("bbox", "segm", "keypoints") if kind in results]
    # each kind lists the same detections in the same order
    return [{k: v for one in same for k, v in one.items()} for same in zip(*kinds, strict=True)]


def _known(path: Path, known: Mapping[str, ImageRecord]) -> ImageRecord | None:
    """The record of the file, whose name in a COCO file may have folders before it."""
    if not known:
        return None
    for start in range(len(path.parts)):
        if record := known.get("/".join(path.parts[start:])):
            return record
    raise ValueError("no image of --annotations has this name")


def _read(path: Path, record: ImageRecord | None, exif: ExifRule) -> tuple[Tensor, bool]:
    """uint8 (3, H, W), and whether its EXIF orientation turned it."""
    content = path.read_bytes()
    stored = read_header(content)
    rule: Exif | None = None if exif == "auto" else exif
    if rule is None and record is not None:
        rule = stored.meant((record.width, record.height))
    orientation = 1 if rule == "ignore" else stored.orientation
    pixels = decode(content, orientation)
    if record is not None and (record.width, record.height) != (pixels.shape[2], pixels.shape[1]):
        raise ValueError(
            f"{pixels.shape[2]} x {pixels.shape[1]} pixels, --annotations say "
            f"{record.width} x {record.height}"
        )
    return pixels, orientation != 1
