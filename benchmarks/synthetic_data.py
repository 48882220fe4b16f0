"""How synthetic images differ from photographs: overlaps, areas, outlines, and what hue tells.

It draws each kind of `maskray data synth`. With `--coco FOLDER` (train2017/, val2017/,
annotations/) that data stands beside them. `--markdown` prints the table of docs/synthetic.md.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import ConvexHull, QhullError

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines.coco.records import JsonObject
from pipelines.coco.rle import mask_of
from pipelines.pack.synth import Kind, synthesise

FOREIGN = 0.05  # of a box's pixels
BINS = 24  # of the hue
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Figures:
    """Of all objects but crowds. The sides are square roots of areas, as shares of the image's."""

    images: int
    classes: int
    objects_per_image: float
    foreign_class: float  # share of boxes with over 5% pixels of another class's objects
    foreign_class_20: float  # the same with over 20%
    foreign_any: float  # with over 5% pixels of any other object
    side_10: float
    side_50: float
    side_90: float
    fill: float  # median share of its box that an object fills
    concave: float  # share of objects that fill less than 80% of their convex hull
    persons: float  # share of objects
    class_from_hue: float  # share of objects whose class their hue tells
    most_frequent: float  # share of the most frequent class: what no knowledge tells


LABELS = {
    "images": "images",
    "classes": "classes",
    "objects_per_image": "objects in an image",
    "foreign_class": "boxes with over 5% pixels of another class",
    "foreign_class_20": "boxes with over 20% pixels of another class",
    "foreign_any": "boxes with over 5% pixels of any other object",
    "side_10": "side of an object, 10th percentile",
    "side_50": "side of an object, median",
    "side_90": "side of an object, 90th percentile",
    "fill": "share of its box that an object fills, median",
    "concave": "objects that fill under 80% of their convex hull",
    "persons": "persons among the objects",
    "class_from_hue": "objects whose class their hue tells",
    "most_frequent": "objects of the most frequent class",
}


def figures(sources: list[tuple[Path, Path]]) -> Figures:
    """sources: pairs of an annotation file and the folder of its images."""
    rows: list[tuple[float, float, float, float, float]] = []
    labels: list[int] = []
    persons: list[bool] = []
    hues: list[float] = []
    images, names = 0, set()
    for file, folder in sources:
        coco = json.loads(file.read_text())
        named = {category["id"]: category["name"] for category in coco["categories"]}
        names |= set(named.values())
        images += len(coco["images"])
        for pixels, objects in _images(coco, folder):
            masks = [mask_of(each["segmentation"], *pixels.shape[:2]) for each in objects]
            classes = np.array([each["category_id"] for each in objects])
            for k, (each, mask) in enumerate(zip(objects, masks, strict=True)):
                if not mask.any():
                    continue
                rows.append(_row(each, mask, masks, classes, k))
                labels.append(each["category_id"])
                persons.append(named[each["category_id"]] == "person")
                hues.append(colorsys.rgb_to_hsv(*(pixels[mask].mean(0) / 255))[0])
    table, label = np.array(rows), np.array(labels)
    own, other, side, fill, hull = table.T
    return Figures(
        images,
        len(names),
        len(rows) / images,
        float((other > FOREIGN).mean()),
        float((other > 4 * FOREIGN).mean()),
        float((own > FOREIGN).mean()),
        *(float(value) for value in np.percentile(side, [10, 50, 90])),
        float(np.median(fill)),
        float((hull < 0.8).mean()),
        float(np.mean(persons)),
        _from_hue(np.array(hues), label),
        float(np.bincount(label).max() / len(label)),
    )


def _images(coco: JsonObject, folder: Path) -> Iterator[tuple[NDArray[np.uint8], list[JsonObject]]]:
    by_image: dict[int, list[JsonObject]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            by_image[annotation["image_id"]].append(annotation)
    for image in coco["images"]:
        with Image.open(folder / image["file_name"]) as file:
            yield np.asarray(file.convert("RGB")), by_image[image["id"]]


def _row(
    annotation: JsonObject, mask: Mask, masks: list[Mask], classes: NDArray[np.int64], number: int
) -> tuple[float, float, float, float, float]:
    """Foreign pixels of the box, those of other classes, side, fill, share of the convex hull."""
    x, y, w, h = annotation["bbox"]
    box = np.s_[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))]
    foreign, of_class = np.zeros_like(mask), np.zeros_like(mask)
    for k, other in enumerate(masks):
        if k != number:
            foreign |= other
            if classes[k] != classes[number]:
                of_class |= other
    rows, columns = np.nonzero(mask)
    # A pixel is a square: its four corners belong to the hull.
    corners = np.concatenate([np.stack([rows + a, columns + b], 1) for a in (0, 1) for b in (0, 1)])
    try:
        hull = float(ConvexHull(corners).volume)
    except QhullError:
        hull = float(len(rows))
    return (
        float((foreign & ~mask)[box].mean()),
        float((of_class & ~mask)[box].mean()),
        float(np.sqrt(mask.mean())),
        float(len(rows) / max(w * h, 1)),
        len(rows) / hull,
    )


def _from_hue(hues: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Of every second object, how many have the most frequent class of the others in their bin."""
    bins = (hues * BINS).astype(int) % BINS
    counts = np.zeros((BINS, labels.max() + 1))
    np.add.at(counts, (bins[::2], labels[::2]), 1)
    counts += 1e-3 * counts.sum(0)  # an empty bin says what all of them say
    return float((counts.argmax(1)[bins[1::2]] == labels[1::2]).mean())


def drawn(kind: Kind, images: int, size: int) -> Figures:
    """The figures of `images` training images of a kind."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        synthesise(out, num_images=images * 5 // 4, size=size, seed=0, kind=kind)
        return figures([(out / "annotations/instances_train.json", out / "images/train")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="images of each kind (default 200)")
    parser.add_argument("--size", type=int, default=128, help="long side in pixels (default 128)")
    parser.add_argument("--coco", type=Path, help="a folder in COCO's layout")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs")
    args = parser.parse_args()
    kinds: tuple[Kind, ...] = ("shapes", "scenes", "grid")
    table = {kind: drawn(kind, args.images, args.size) for kind in kinds}
    if args.coco:
        splits = [f"{split}2017" for split in ("train", "val")]
        files = [(args.coco / f"annotations/instances_{s}.json", args.coco / s) for s in splits]
        table["coco"] = figures([(file, folder) for file, folder in files if file.exists()])
    if args.json:
        print(json.dumps({name: asdict(row) for name, row in table.items()}))
        return
    separator = " | " if args.markdown else "  "
    print(separator.join(["", "", *table, ""]).strip(" ") if args.markdown else "  ".join(table))
    if args.markdown:
        print("|" + "---|" * (len(table) + 1))
    for field in fields(Figures):
        values = [_text(field.name, getattr(row, field.name)) for row in table.values()]
        line = separator.join([LABELS[field.name], *values])
        print(f"| {line} |" if args.markdown else line)


def _text(name: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if name.startswith(("side", "objects")):
        return f"{value:.2f}" if name.startswith("side") else f"{value:.1f}"
    return f"{100 * value:.0f}%"


if __name__ == "__main__":
    main()
