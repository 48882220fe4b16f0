"""What a training step asks of a GPU, counted without one.

    python benchmarks/gpu_plan.py --preset r50-fpn --by-part
    python benchmarks/gpu_plan.py --preset tiny,r50-c4 --height 256 --width 256 --json

The step runs on the null CUDA of the tests (tests/nullgpu), which computes nothing. Counted:
launches (with copies on the device and fills), waits of the host, copies of pageable memory, bytes
of every operation, peak memory of the allocator. Estimated: the roofline of an H100 from the bytes
and operations, and images per second from that and from atomic additions; the host is not in it.
The last line is one JSON object for each preset. It needs gcc and a torch built for CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.nullgpu import null_cuda

if TYPE_CHECKING:
    from benchmarks.gpu.counting import Counted


@dataclass(frozen=True)
class Plan:
    """launches: what the host gives the device to do in one step."""

    launches: int
    waits: int
    pageable_copies: int
    gb: float
    peak_gib: float
    roofline_ms: float
    images_per_s_estimate: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="r50-fpn", help="one or more, by commas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--predict", action="store_true", help="evaluation instead of training")
    parser.add_argument("--by-part", action="store_true")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON")
    args = parser.parse_args()
    if reason := null_cuda.why_not():
        print(f"error: no null CUDA here: {reason}", file=sys.stderr)
        return 2
    null_cuda.load()
    import torch

    from benchmarks.gpu.counting import count
    from benchmarks.gpu.work import Work

    torch.set_num_threads(1)
    # Triton's first words on every GPU
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    null_cuda.install()
    canvas = (args.height, args.width)
    names = args.preset.split(",")
    for name in names:
        work = Work(name, args.batch, args.objects, canvas, args.precision)
        found = count(work, args.predict)
        plan = asdict(plan_of(found, work.images))
        if not args.json:
            print(f"{name}: {'prediction' if args.predict else 'training'}, {work}")
            tell(found, args.by_part)
        print(json.dumps(plan if len(names) == 1 else {"preset": name, **plan}), flush=True)
    return 0


def plan_of(found: Counted, images: int) -> Plan:
    traffic = found.traffic
    return Plan(
        launches=found.operations.total(),
        waits=found.waits.total(),
        pageable_copies=found.pageable.total(),
        gb=round(traffic.bytes.total() / 1e9, 2),
        peak_gib=round(found.peak_gib, 2),
        roofline_ms=round(traffic.roofline_ms, 2),
        images_per_s_estimate=round(1e3 * images / (traffic.roofline_ms + traffic.atomics_ms), 1),
    )


def tell(found: Counted, by_part: bool) -> None:
    traffic = found.traffic
    if by_part:
        print(
            f"{'part':56s} {'launches':>8s} {'GB':>7s} {'TFLOP':>6s} {'ms':>6s} {'G atomics':>11s}"
        )
        for part in sorted({*found.operations, *traffic.bytes}):
            print(
                f"{part:56s} {found.operations[part]:8d} {traffic.bytes[part] / 1e9:7.2f} "
                f"{traffic.flops[part] / 1e12:6.3f} {1e3 * traffic.seconds.get(part, 0):6.2f} "
                f"{traffic.atomics[part] / 1e9:11.2f}"
            )
        print("most bytes:")
        for (part, operation), moved in traffic.bytes_by_operation.most_common(16):
            print(f"  {moved / 1e9:7.2f} GB  {operation} in {part}")
        print("most launches:")
        for kernel, launches in found.kernels.most_common(12):
            print(f"  {launches:5d}  {kernel[:110]}")
    for where, times in (found.waits + found.pageable).most_common():
        print(f"  {times:3d} x {where}")


if __name__ == "__main__":
    sys.exit(main())
