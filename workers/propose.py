"""`python -m workers.propose TRIAL_FOLDER --out URI`: writes the proposals of a trained run.

Other arms then train on the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from contract.attempt import ARTIFACT_FOLDER, LAST_WEIGHTS
from contract.command import run_command
from contract.files import Files
from contract.machine.folders import scratch
from contract.model import FixedProposals
from contract.recipe import RunConfig, parse_run
from contract.yaml import parse_yaml
from model.accelerate import accelerate
from model.build import build_detector
from model.detector import Detector
from pipelines.load.loader import EvalLoader
from pipelines.load.proposals import Boxes, write_proposals
from pipelines.shards.dataset import open_dataset


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="maskray proposals", description="Writes a trained run's proposals."
    )
    parser.add_argument(
        "run", metavar="TRIAL_FOLDER", help="folder or URI of a finished run with an RPN"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="URI",
        help="the file to write; name it in model.proposals.uri",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(lambda: _propose(parser.parse_args(argv)), argv)


def _propose(arguments: argparse.Namespace) -> int:
    storage = Files(arguments.run)
    run = trained_run(storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = trained_detector(run, storage, device)
    images = write_proposals(arguments.out, proposals(run, detector, device))
    if arguments.json:
        print(json.dumps({"out": arguments.out, "images": images}))
    else:
        print(f"proposals for {images} images: {arguments.out}")
    return 0


def trained_run(storage: Files) -> RunConfig:
    """The configuration of a finished run.

    Raises ValueError if there is none, or if it has no RPN.
    """
    try:
        text = storage.read(f"{ARTIFACT_FOLDER}/config.yaml").decode()
    except FileNotFoundError:
        raise ValueError(
            f"{storage.uri}: no run there ({ARTIFACT_FOLDER}/config.yaml is missing)"
        ) from None
    run = parse_run(parse_yaml(text, storage.uri), storage.uri)
    if isinstance(run.model.proposals, FixedProposals):
        raise ValueError(
            f"{storage.uri}: model.proposals.kind is 'fixed', it has no RPN; "
            "take a run that trained one"
        )
    return run


def trained_detector(
    run: RunConfig, storage: Files, device: torch.device | str = "cpu"
) -> Detector:
    """The detector with the run's last weights, ready to predict."""
    if not storage.exists(LAST_WEIGHTS):
        raise ValueError(
            f"{storage.uri}: has no {LAST_WEIGHTS}; the run is not finished, resume it first"
        )
    detector = build_detector(run.model, run.seed).to(device)
    accelerate(detector)
    # safetensors reads local files alone; behind a URI this is a copy
    with scratch("weights") as folder:
        detector.load_state_dict(load_file(storage.fetch(LAST_WEIGHTS, Path(folder))))
    return detector.eval()


def proposals(
    run: RunConfig, detector: Detector, device: torch.device
) -> Iterator[tuple[int, Boxes, Boxes]]:
    """(image id, boxes, scores) of every training and validation image.

    Boxes are in pixels of the image's file. The detector sees each image at test-time size;
    training images get as many proposals as in training.
    """
    # with a holdout the loader would give the held-out images alone
    everything = run.data.model_copy(
        update={"filter": run.data.filter.model_copy(update={"holdout": 0.0})}
    )
    for uri in dict.fromkeys((run.data.train, run.data.val)):  # once where both are the same
        dataset = open_dataset(uri, cache_gib=run.data.cache_gib)
        loader = EvalLoader(
            everything,
            dataset,
            run.model.image,
            batch_size=run.loop.eval_batch,
            rank=0,
            world_size=1,
        )
        for batch in loader:
            # A file for training has as many boxes of an image as the RPN would train on.
            proposed = detector.propose(batch.to(device), training=uri == run.data.train)
            for image_id, boxes, scores, valid in zip(
                batch.sample_ids.tolist(), *proposed, strict=True
            ):
                yield image_id, boxes[valid].cpu().numpy(), scores[valid].cpu().numpy()
        loader.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
