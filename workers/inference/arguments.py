"""The arguments of the programs that take a detector which is trained."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_trained_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_trained` reads. Imports nothing heavy, so that `--help` answers at once."""
    parser.add_argument(
        "trained",
        metavar="RUN|WEIGHTS",
        help="a run's folder, a trial (STUDY:KEY), or a file of weights: maskray's, torchvision's "
        "or detectron2's",
    )
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        default="last",
        help="which weights of a run (default: %(default)s)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="RUN.yaml", help="a run file that says what WEIGHTS are"
    )
