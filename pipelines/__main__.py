"""`python -m pipelines data ...` and `... eval ...`. The command `maskray` passes both on to here.

Imports are inside the commands: packing needs no torch, and help needs neither Arrow nor NumPy.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from contract.command import SUCCESS, WORK_FAILED, run_app
from pipelines.progress import bar

if TYPE_CHECKING:
    from pipelines.pack.join import Joined
    from pipelines.pack.pack import Packed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pack, check and evaluate detection data.",
)
data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="COCO to Arrow shards and back."
)
app.add_typer(data, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Uri = Annotated[
    str, typer.Argument(metavar="URI", help="Packed dataset: a folder, s3://... or gs://...")
]


@data.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    images: Annotated[
        int, typer.Option(help="Images in all; a fifth of them (at least one) are for validation.")
    ] = 500,
    size: Annotated[int, typer.Option(help="Long side of an image in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same files.")] = 0,
    keypoints: Annotated[
        bool, typer.Option("--keypoints", help="One category is a person with 17 keypoints.")
    ] = False,
    kind: Annotated[
        Literal["shapes", "scenes", "grid"],
        typer.Option(
            help="shapes: 4 categories, each with a hue of its own. scenes: 12 that the outline "
            "alone tells apart. grid: scenes whose boxes lie on multiples of 16 px."
        ),
    ] = "shapes",
    outlines: Annotated[
        int, typer.Option(help="Categories of scenes and grid: the first so many of the 12.")
    ] = 12,
    test: Annotated[
        int, typer.Option(help="Images of a third split, to evaluate on once; besides --images.")
    ] = 0,
    pack: Annotated[
        bool, typer.Option("--pack", help="Also pack each split into OUT/SPLIT, ready to train on.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Draw a synthetic COCO dataset.

    It is OUT/annotations/instances_{train,val,test}.json and OUT/images/{train,val,test}/.
    """
    from pipelines.pack.pack import PackOptions
    from pipelines.pack.pack import pack as pack_dataset
    from pipelines.pack.synth import synthesise

    with bar("drawing", as_json) as progress:
        made = synthesise(
            out,
            num_images=images,
            size=size,
            seed=seed,
            keypoints=keypoints,
            kind=kind,
            num_test=test,
            outlines=outlines,
            progress=progress,
        )
    settings = made.settings
    packed = {}
    for split in settings.splits() if pack else ():
        files = [out / "annotations" / f"instances_{split}.json"]
        result = pack_dataset(files, str(out / "images" / split), str(out / split), PackOptions())
        packed[split] = {
            "out": str(out / split),
            "manifest": result.manifest.hash,
            "unchanged": result.unchanged,
        }
    unchanged = " (was there already, unchanged)" if made.unchanged else ""
    counts = f"{settings.train} training and {settings.val} validation images"
    counts += f" and {settings.test} test images" if settings.test else ""
    text = f"{counts} in {out}{unchanged}"
    if packed:
        text += f"\npacked: {' and '.join(str(out / split) for split in packed)}"
    content = {**asdict(settings), "unchanged": made.unchanged, "packed": packed}
    return _done(as_json, {"out": str(out), **content}, text)


@data.command()
def pack(
    annotations: Annotated[
        list[Path],
        typer.Option(
            help="COCO JSON. Give it twice to merge instances and keypoints by annotation id."
        ),
    ],
    images: Annotated[str, typer.Option(help="Folder or URI that the file names are relative to.")],
    out: Annotated[str, typer.Option(help="Folder or URI to write to.")],
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="Stop at the first bad input, or leave bad ones out and list them."),
    ] = "fail",
    exif: Annotated[
        Literal["auto", "apply", "ignore"],
        typer.Option(
            help="Turn images as their EXIF block says. auto: as the sizes in the JSON show."
        ),
    ] = "auto",
    shard_mib: Annotated[float, typer.Option(min=0.01, help="Size of a shard.")] = 64.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one for each core.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Pack COCO JSON and images into shards.

    After an interruption the same command goes on. Once all is packed it changes nothing.
    """
    from pipelines.pack.pack import PackOptions, default_workers
    from pipelines.pack.pack import pack as pack_dataset
    from pipelines.pack.whole import SKIPPED_NAME

    options = PackOptions(on_error, shard_mib, workers or default_workers(), exif)
    with bar("packing", as_json) as progress:
        packed = pack_dataset(annotations, images, out, options, progress)
    lines, content = _dataset_told(out, packed)
    if packed.skipped:
        lines.append(
            f"left out {packed.skipped} bad inputs, listed in {out.rstrip('/')}/{SKIPPED_NAME}"
        )
    lines += [f"note: {remark}" for remark in packed.remarks]
    return _done(as_json, {**content, "skipped": packed.skipped}, "\n".join(lines))


@data.command()
def join(
    uris: Annotated[
        list[str],
        typer.Argument(metavar="URI...", help="Packed datasets: folders, s3://... or gs://..."),
    ],
    out: Annotated[str, typer.Option(help="Folder or URI to write to.")],
    union: Annotated[
        bool,
        typer.Option(
            "--union",
            help="Let them have other categories. What a dataset does not label trains as "
            "background in its images.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Join packed datasets into one, to train on all of them.

    Categories match by name. The first dataset keeps its ids, those of the others move up.
    """
    from pipelines.pack.join import join as join_datasets
    from pipelines.pack.pack import default_workers

    with bar("joining", as_json) as progress:
        joined = join_datasets(
            uris, out, union=union, num_workers=default_workers(), progress=progress
        )
    lines, content = _dataset_told(out, joined)
    lines += [f"{uri}: {part}" for uri, part in zip(uris, joined.parts, strict=True)]
    lines += [f"note: {remark}" for remark in joined.remarks]
    content |= {"parts": [part.model_dump() for part in joined.parts]}
    return _done(as_json, content, "\n".join(lines))


def _dataset_told(out: str, made: Packed | Joined) -> tuple[list[str], dict[str, Any]]:
    """What `pack` and `join` both say of a dataset: the first lines, and fields of the JSON."""
    manifest = made.manifest
    lines = [
        f"{manifest.num_images} images, {manifest.num_annotations} annotations, "
        f"{manifest.num_shards} shards: {out}"
    ]
    lines += ["was there already, unchanged"] if made.unchanged else []
    return lines, {
        "out": out,
        "images": manifest.num_images,
        "annotations": manifest.num_annotations,
        "shards": manifest.num_shards,
        "remarks": {remark.kind: remark.count for remark in made.remarks},
        "unchanged": made.unchanged,
        "resumed_shards": made.resumed_shards,
        "manifest": manifest.hash,
    }


@data.command()
def verify(uri: Uri, as_json: Json = False, debug: Debug = False) -> int:
    """Read every byte and compare it with the manifest; exit 1 names each damaged shard."""
    from pipelines.inspect.verify import verify as verify_dataset

    with bar("verifying", as_json) as progress:
        report = verify_dataset(uri, progress)
    lines = [
        f"{damage.shard}{'' if damage.row is None else f', row {damage.row}'}: {damage.error}"
        for damage in report.errors
    ]
    state = f"{len(report.errors)} damaged" if report.errors else "all whole"
    lines.append(f"{report.shards} shards, {report.samples} samples: {state}")
    _done(as_json, {"ok": not report.errors, **asdict(report)}, "\n".join(lines))
    return WORK_FAILED if report.errors else SUCCESS


@data.command()
def show(
    uri: Uri,
    out: Annotated[Path | None, typer.Option(help="Also draw samples into this PNG.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to draw.")] = 9,
    masks: Annotated[bool, typer.Option("--masks", help="Draw masks too.")] = False,
    seed: Annotated[int, typer.Option(help="Which samples to draw.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Counts and categories, and a picture of samples with boxes, masks and keypoints."""
    from pipelines.inspect.show import draw_samples, summary
    from pipelines.shards.dataset import open_dataset

    dataset = open_dataset(uri)
    counts = summary(dataset)
    content = asdict(counts)
    lines = [f"{name:12} {value}" for name, value in content.items() if name != "categories"]
    lines += [f"  {c.id:>4} {c.name:20} {c.annotations}" for c in counts.categories]
    if out is not None:
        ids = draw_samples(dataset, out, count=samples, seed=seed, masks=masks)
        content |= {"picture": str(out), "drawn": ids}
        lines.append(f"drew {len(ids)} samples: {out}")
    return _done(as_json, content, "\n".join(lines))


@data.command()
def export(
    uri: Uri,
    out: Annotated[Path, typer.Option(help="File to write.")],
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Give COCO JSON back: pycocotools computes the same numbers on it, to the bit."""
    from pipelines.coco.checks import check_file_to_write
    from pipelines.shards.dataset import open_dataset

    check_file_to_write(out)
    coco = open_dataset(uri).coco()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(coco))
    counts = {name: len(coco[name]) for name in ("images", "annotations", "categories")}
    text = f"{len(coco['annotations'])} annotations: {out}"
    return _done(as_json, {"out": str(out), **counts}, text)


@data.command()
def stage(
    uris: Annotated[
        list[str],
        typer.Argument(metavar="URI...", help="Packed datasets: folders, s3://... or gs://..."),
    ],
    cache: Annotated[
        str, typer.Option(help="Cache folder; empty is the one that training uses by default.")
    ] = "",
    cache_gib: Annotated[float, typer.Option(min=0.001, max=1e6, help="Its size cap.")] = 20.0,
    lines: Annotated[
        bool, typer.Option("--lines", help="Tell progress on stderr line by line, for a log.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Fetch and verify all shards of remote datasets, ahead of a study, into this node's cache."""
    from pipelines.shards.dataset import open_dataset, stage_datasets

    datasets = [open_dataset(uri, cache, cache_gib) for uri in uris]
    with bar("fetching", as_json, lines) as progress:
        staged = stage_datasets(datasets, progress)
    where = (
        f"{staged.bytes / 2**20:.1f} MiB in {staged.cache}"
        if staged.cache
        else "all on this machine already"
    )
    lost = (
        f"; evicted {staged.evicted} files of other datasets, give --cache-gib more"
        if staged.evicted
        else ""
    )
    # The same form as `maskray stage` gives for many nodes.
    node = {
        "node": "",
        "address": socket.gethostname(),
        "state": "done",
        "error": "",
        **asdict(staged),
    }
    return _done(as_json, {"uris": uris, "ok": True, "nodes": [node]}, where + lost)


@app.command(name="eval")
def evaluate(
    gt: Annotated[str, typer.Option(help="Ground truth: COCO JSON, or a packed dataset.")],
    dt: Annotated[Path, typer.Option(help="COCO results file.")],
    iou: Annotated[
        Literal["bbox", "segm", "boundary", "keypoints"],
        typer.Option(help="What to compare; boundary is Boundary AP of masks."),
    ] = "bbox",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also give each category's AP.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """pycocotools' statistics by name, as fractions (-1 where there is nothing to evaluate)."""
    from contract.data import MANIFEST_NAME
    from pipelines.evaluate.evaluation import evaluate as evaluate_results
    from pipelines.evaluate.evaluation import read_results
    from pipelines.shards.dataset import open_dataset

    # A packed dataset is a folder with a manifest, and JSON is a file: no flag is needed.
    packed = "://" in gt or (Path(gt) / MANIFEST_NAME).exists()
    truth = open_dataset(gt) if packed else gt
    boundary = iou == "boundary"
    scores = evaluate_results(
        truth, read_results(dt), "segm" if iou == "boundary" else iou, boundary=boundary
    )
    lines = [f"{name:6} {value:.4f}" for name, value in scores.stats.items()]
    content: dict[str, Any] = dict(scores.stats)
    if per_class:
        # AP alone for people: six columns of 80 rows are for a program.
        lines += [f"  {name:20} {value:.4f}" for name, value in scores.per_class["AP"].items()]
        content |= {"per_class": scores.per_class}
    if scores.notes:
        lines += [f"note: {note}" for note in scores.notes]
        content |= {"notes": list(scores.notes)}
    return _done(as_json, content, "\n".join(lines))


def _done(as_json: bool, content: dict[str, Any], text: str) -> int:
    print(json.dumps(content) if as_json else text)
    return SUCCESS


def main() -> None:
    sys.exit(run_app(app, sys.argv[1:], "maskray"))


if __name__ == "__main__":
    main()
