"""`python -m workers.propose TRIAL_FOLDER --out URI`: writes the proposals of a trained run.

Other arms then train on the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

import torch

from contract.attempt import LAST_WEIGHTS
from contract.command import add_output_options, run_command
from contract.files import Files
from contract.model import FixedProposals
from contract.recipe import RunConfig
from model.detector import Detector
from pipelines.load.loader import EvalLoader
from pipelines.load.proposals import Boxes, write_proposals
from pipelines.shards.dataset import open_dataset
from workers.inference.trained import run_config, trained_run


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
    add_output_options(parser)
    return run_command(lambda: _propose(parser.parse_args(argv)), argv)


def _propose(arguments: argparse.Namespace) -> int:
    storage = Files(arguments.run)
    run = trained_with_rpn(storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = trained_run(storage, LAST_WEIGHTS, device).detector
    images = write_proposals(arguments.out, proposals(run, detector, device))
    if arguments.json:
        print(json.dumps({"out": arguments.out, "images": images}))
    else:
        print(f"proposals for {images} images: {arguments.out}")
    return 0


def trained_with_rpn(storage: Files) -> RunConfig:
    """The configuration of a finished run.

    Raises ValueError if there is none, or if it has no RPN.
    """
    run = run_config(storage)
    if isinstance(run.model.proposals, FixedProposals):
        raise ValueError(
            f"{storage.uri}: model.proposals.kind is 'fixed', it has no RPN; "
            "take a run that trained one"
        )
    return run


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
