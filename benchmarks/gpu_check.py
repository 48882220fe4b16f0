"""What only a GPU can show, in under 9 minutes and one file: `make gpu-check`.

    python benchmarks/gpu_check.py --json gpu.json
    python benchmarks/gpu_check.py --only throughput,kernels

Each section is a list of probes. A probe that fails is told in `failed`, and the others go on;
the file is written after every probe, so that a run that is cut short keeps what it found. The
sections stand in the order of importance, each with a budget of seconds after which its other
probes are left out. It needs torch, torchvision, pydantic, PyYAML and NumPy; encoding masks
needs pycocotools and pyarrow too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import agreement, kernels, machine, speed
from benchmarks.gpu.probes import DRY, FULL, Probe, Scale
from contract.recipe import LoopConfig
from workers.training.arithmetic import set_arithmetic


@dataclass(frozen=True)
class Section:
    probes: Callable[[Scale], Iterator[Probe]]
    budget_s: float


SECTIONS = {
    "environment": Section(machine.environment, 20),
    "agreement": Section(agreement.agreement, 90),
    "waits": Section(agreement.waits, 60),
    "throughput": Section(speed.throughput, 120),
    "kernels": Section(kernels.kernels, 40),
    "roi_align": Section(kernels.roi_align, 40),
    "graphs": Section(speed.graphs, 90),
    "prediction": Section(speed.prediction, 50),
    "repeats": Section(agreement.repeats, 60),
    "suppression": Section(kernels.suppression, 20),
    "settings": Section(speed.settings, 50),
    "copies": Section(machine.copies, 10),
    "nccl": Section(machine.nccl, 40),
    "compiled": Section(speed.compiled, 120),
}


class Report:
    """The answers of the probes by section, and the errors, in a file that is always current."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self.path = path
        self.limit_s = limit_s
        self.found: dict[str, dict[str, JsonValue]] = {}
        self.failed: dict[str, str] = {}
        self.began = time.monotonic()
        self.before_s = 0.0

    def go_on(self) -> None:
        """Takes over what an earlier process of the same check has written."""
        read = json.loads(self.path.read_text())
        self.failed, self.before_s = read.pop("failed"), read.pop("seconds")
        self.found = read

    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.began

    def write(self) -> None:
        rest = {"failed": self.failed, "seconds": round(self.elapsed_s(), 1)}
        self.path.write_text(json.dumps({**self.found, **rest}, indent=1) + "\n")

    def tell(self, section: str, probe: str) -> None:
        answer = self.found[section].get(probe, self.failed.get(f"{section} {probe}"))
        print(
            f"{self.elapsed_s():6.1f} s  {section} {probe}: {json.dumps(answer)[:300]}", flush=True
        )


def run_section(name: str, scale: Scale, report: Report) -> bool:
    """Runs a section's probes while there is time. Returns whether the device still answers."""
    section, began = SECTIONS[name], report.elapsed_s()
    report.found[name] = {}
    alive = True
    try:
        for probe in section.probes(scale):
            title = f"{name} {probe.name}"
            late = report.elapsed_s() > min(began + section.budget_s, report.limit_s)
            # a dry run shows that each probe runs, on a machine that may be busy
            if (late and not scale.dry) or not alive:
                report.failed[title] = "no time left" if alive else "the device did not answer"
                continue
            try:
                report.found[name][probe.name] = probe.call()
            except Exception as error:  # noqa: BLE001 - the other probes go on
                report.failed[title] = told(error)
            alive = clean_up()
            report.tell(name, probe.name)
            report.write()
    except Exception as error:  # noqa: BLE001 - what the probes of this section share
        report.failed[name] = told(error)
        alive = clean_up()
    report.write()
    return alive


def told(error: Exception) -> str:
    """The error and where in our code it arose, short enough for a report."""
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "-packages" not in f.filename]
    return f"{text[:600]} [{' '.join(ours[-4:])}]"


def clean_up() -> bool:
    """Frees what a probe left. Returns whether the device still answers."""
    gc.collect()
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="the report")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas")
    parser.add_argument("--dry", action="store_true", help="small; for the null CUDA of the tests")
    parser.add_argument("--go-on", action="store_true", help="keep what the report has already")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: no section {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device here", file=sys.stderr)
        return 2
    # the first words of torch and of Triton on every GPU
    warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    set_arithmetic(LoopConfig(), torch.device("cuda"))  # as the workers do
    report = Report(args.json, 60 * args.minutes)
    if args.go_on:
        report.go_on()
    for number, name in enumerate(names):
        rest = names[number + 1 :]
        if not run_section(name, DRY if args.dry else FULL, report) and rest:
            # an illegal access ends the context of a process: a fresh one does the rest
            options = ["--json", str(args.json), "--minutes", str(args.minutes), "--go-on"]
            options += ["--dry"] * args.dry
            os.execv(sys.executable, [sys.executable, __file__, "--only", ",".join(rest), *options])
    print(f"failed: {json.dumps(report.failed, indent=1) if report.failed else 'nothing'}")
    print(f"{args.json}: {report.elapsed_s():.0f} s")
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
