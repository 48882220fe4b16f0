"""`python -m workers.predict RUN|WEIGHTS IMAGES... --out DIR`: pictures and COCO results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from contract.command import SUCCESS, WORK_FAILED, add_output_options, run_command
from workers.inference.arguments import add_trained_arguments


def main(argv: Sequence[str]) -> int:
    return run_command(lambda: _predict(_parser().parse_args(argv)), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskray predict",
        description="Predicts on images. Writes DIR/pictures/ and COCO results in DIR/results/. "
        "Ends with 1 if an image could not be read; the others are predicted all the same.",
    )
    add_trained_arguments(parser)
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGES", help="JPEG and PNG files, or folders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--score",
        type=float,
        default=0.5,
        help="the least score in the pictures (default: %(default)s); the results hold all",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="COCO file that gives the images' ids by name; without it they count from 1",
    )
    parser.add_argument(
        "--exif",
        choices=("auto", "apply", "ignore"),
        default="auto",
        help="turn images as their EXIF block says; auto: as the sizes in --annotations show, "
        "without them yes",
    )
    add_output_options(parser)
    return parser


def _predict(arguments: argparse.Namespace) -> int:
    # imported here so that `--help` and mistakes in the arguments answer at once
    if not 0 <= arguments.score <= 1:
        raise ValueError(f"--score {arguments.score:g}: give a number from 0 to 1")
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    import torch

    from workers.inference.predict import (
        Bad,
        Summary,
        image_files,
        known_images,
        picture,
        predictions,
    )
    from workers.inference.trained import load_trained

    pictures, results = out / "pictures", out / "results"
    files = image_files(arguments.images, pictures)
    known = known_images(arguments.annotations)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(arguments.trained, arguments.weights, arguments.config, device)
    for folder in (pictures, results):
        folder.mkdir(parents=True, exist_ok=True)
    print(f"{trained.source}: {len(trained.categories)} classes", file=sys.stderr)
    summary, names = Summary(), set[str]()
    for one in predictions(trained, files, known, arguments.exif, summary):
        if isinstance(one, Bad):
            print(f"{one.path}: not predicted: {one.error}", file=sys.stderr)
            continue
        # two folders may hold files of one name
        numbered = (f"{one.path.stem}-{number}" for number in count(2))
        name = next(name for name in chain([one.path.stem], numbered) if name not in names)
        names.add(name)
        picture(trained, one, arguments.score).save(pictures / f"{name}.png")
    if not summary.images:
        first = summary.bad[0]
        raise ValueError(
            f"none of {len(files)} image(s) could be predicted; {first.path}: {first.error}"
        )
    for kind, of_kind in summary.results.items():
        (results / f"{kind}.json").write_text(json.dumps(of_kind), encoding="utf-8")
    described = {
        "images": [image.model_dump() for image in summary.images],
        "categories": [category.model_dump() for category in trained.categories],
    }
    (results / "images.json").write_text(json.dumps(described), encoding="utf-8")
    detections = len(summary.results["bbox"])
    if arguments.json:
        bad = [{"file": str(bad.path), "error": bad.error} for bad in summary.bad]
        counts = {"images": len(summary.images), "detections": detections, "bad": bad}
        print(json.dumps({"out": str(out), "turned": summary.turned, **counts}))
    else:
        turned = f"; {summary.turned} turned by EXIF" if summary.turned else ""
        bad_words = f"; {len(summary.bad)} not predicted (see above)" if summary.bad else ""
        print(
            f"{len(summary.images)} image(s), {detections} detection(s): {pictures}, {results}"
            f"{turned}{bad_words}"
        )
    return WORK_FAILED if summary.bad else SUCCESS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
