"""Images/s of the tiny preset on 2 ranks beside 1 rank, one thread each.

    python benchmarks/scaling.py [--steps 20] [--json]

It also gives the share of a step that communication takes. Each rank takes the same images alone,
then with its gradients reduced over the ranks, in turns. The difference is communication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMAGES_PER_RANK = 4


def rank_program(data: str, steps: int) -> None:
    """Measures on this rank. Rank 0 prints one line of JSON."""
    import torch

    from contract.presets import run_preset
    from contract.recipe import apply_overrides, parse_run
    from workers.training.build import initial_detector, open_datasets, train_loader_opener
    from workers.training.state import TrainState
    from workers.training.step import LossSums, accumulate_gradients, apply_gradients, distributed
    from workers.training.world import World, launched_world

    torch.set_num_threads(1)
    with launched_world(os.environ) as world:
        overrides: dict[str, Any] = {
            "data.train": f"{data}/train",
            "data.val": f"{data}/val",
            "loop.global_batch": IMAGES_PER_RANK * world.size,
        }
        run = parse_run(apply_overrides(run_preset("tiny"), overrides), "benchmark")
        state = TrainState(run, initial_detector(run))
        sums = LossSums(state.detector)
        modules = {
            "alone": (sums, World(0, 1, world.device)),
            "together": (distributed(sums, world), world),
        }
        batches = iter(train_loader_opener(run, open_datasets(run, "")[0], world)(0))
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        for _ in range(steps + 2):
            data_step = next(batches)
            for name, (module, members) in modules.items():
                world.barrier()
                began = time.perf_counter()
                accumulate_gradients(module, data_step.batches, run.loop, members, state.scaler, ())
                apply_gradients(state.trained, state.optimiser, state.scaler, 1e-6, 10.0)
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
        if world.is_first:
            print(
                json.dumps({"ranks": world.size, "global_batch": run.loop.global_batch, **medians})
            )


def launched(data: Path, ranks: int, steps: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command += [str(Path(__file__).resolve()), "--rank-program", str(data), "--steps", str(steps)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    output = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank-program", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_program:
        rank_program(arguments.rank_program, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pipelines",
                "data",
                "synth",
                folder,
                "--images",
                "200",
                "--pack",
                "--json",
            ],
            check=True,
            stdout=subprocess.PIPE,
        )
        one, two = (launched(Path(folder), ranks, arguments.steps) for ranks in (1, 2))
    rates = [report["global_batch"] / report["together"] for report in (one, two)]
    share = 1 - two["alone"] / two["together"]
    if not arguments.json:
        print(
            f"1 rank {rates[0]:.1f} images/s, 2 ranks {rates[1]:.1f} images/s, "
            f"{share:.1%} of a step is communication"
        )
    line = {
        "name": "images/s on 2 ranks against 1, one thread each",
        "ours": rates[1],
        "peer": rates[0],
        "ratio": rates[1] / rates[0],
        "device": "cpu",
        "pairs": arguments.steps,
        "communication_share": share,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
