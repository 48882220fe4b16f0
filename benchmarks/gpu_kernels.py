"""Suppression and matching on one GPU: our kernels against torch's path, same work, equal results.

Milliseconds by CUDA events: the median of calls in turns. Under 40 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import matching
from model.gpu import matching as gpu_matching
from model.gpu.suppression import nms_in_two_launches
from model.matching import Chosen, Rule
from model.rpn.anchors import cell_anchors, grid_anchors
from model.rpn.nms import nms_fixed_shape
from model.sample_hash import ROI_STREAM, RPN_STREAM

CANVAS = (800, 1344)
ANCHORS = Rule(256, 0.5, 0.7, 0.3, True, RPN_STREAM)
ROIS = Rule(512, 0.25, 0.5, 0.5, False, ROI_STREAM)


def median_ms(call: Callable[[], object], calls: int) -> float:
    """Of one call on the device; the first two warm up."""
    times = []
    for number in range(calls + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def boxes(*shape: int, seed: int) -> Tensor:
    """Random boxes on the canvas with sides of 16 to 400 px."""
    generator = torch.Generator().manual_seed(seed)
    height, width = CANVAS
    corner = torch.rand(*shape, 2, generator=generator) * torch.tensor([width, height])
    sides = 16 + 384 * torch.rand(*shape, 2, generator=generator) ** 3
    return torch.cat([corner, corner + sides], dim=-1).cuda()


def all_anchors() -> Tensor:
    """(1, 268569, 4): five levels of three ratios."""
    levels = []
    for stride in (4, 8, 16, 32, 64):
        cells = cell_anchors([8 * stride], [0.5, 1.0, 2.0], rounded=False)
        rows, columns = (-(-side // stride) for side in CANVAS)
        levels.append(grid_anchors(cells, rows, columns, (stride, stride)))
    return torch.cat(levels)[None].cuda()


def suppressed(lists: int, count: int) -> dict[str, object]:
    """Lists of boxes, best first, at an IoU of 0.7."""
    given, valid = (
        boxes(lists, count, seed=count),
        torch.ones(lists, count, dtype=torch.bool).cuda(),
    )
    order = torch.arange(count, 0, -1, dtype=torch.float32, device="cuda")
    kept = nms_in_two_launches(given, valid, 0.7)
    expected = torch.zeros_like(kept)
    for own, boxes_N4 in zip(expected, given, strict=True):
        own[torchvision.ops.nms(boxes_N4, order, 0.7)] = True
    return {
        "ours_ms": median_ms(lambda: nms_in_two_launches(given, valid, 0.7), 30),
        "torch_ms": median_ms(lambda: nms_fixed_shape(given, valid, 0.7), 3),
        "torchvision_ms": median_ms(
            lambda: [torchvision.ops.nms(own, order, 0.7) for own in given], 3
        ),
        "equal": torch.equal(kept, expected),
        "kept": int(kept.sum()),
    }


def matched(rule: Rule, given: Tensor, objects: int, own_lists: bool) -> dict[str, object]:
    """Boxes of 8 images against padded objects, of which 7 are real."""
    those = boxes(8, objects, seed=objects)
    valid = (torch.arange(objects) < 7).expand(8, -1).contiguous().cuda()
    keys = torch.arange(8).cuda() * 77
    flags = torch.ones(given.shape[:2], dtype=torch.bool).cuda() if own_lists else None
    numbers = torch.arange(given.shape[1]).expand(8, -1).cuda() if own_lists else None
    ours, theirs = gpu_matching.MatchedSampling(rule), matching.MatchedSampling(rule)

    def call(part: Callable[..., Chosen]) -> Chosen:
        return part(given, flags, numbers, those, valid, keys)

    found, expected = call(ours), call(theirs)
    real = expected.sample.valid
    return {
        "ours_ms": median_ms(lambda: call(ours), 30),
        "torch_ms": median_ms(lambda: call(theirs), 5),
        "equal": torch.equal(found.sample.valid, real)
        and torch.equal(found.sample.positive, expected.sample.positive)
        and torch.equal(found.sample.index[real], expected.sample.index[real])
        and torch.equal(found.object_BS[real], expected.object_BS[real]),
        "positives": int(expected.sample.positive.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result: dict[str, object] = {"device": torch.cuda.get_device_name()}
    for lists, count in ((40, 2000), (1, 12000)):
        result[f"suppression {lists} x {count}"] = suppressed(lists, count)
    anchors, candidates = all_anchors(), boxes(8, 1032, seed=0)
    for objects in (16, 32, 128):
        result[f"anchors 8 x {anchors.shape[1]} x {objects}"] = matched(
            ANCHORS, anchors, objects, own_lists=False
        )
    result["RoIs 8 x 1032 x 32"] = matched(ROIS, candidates, 32, own_lists=True)
    if args.json:
        print(json.dumps(result))
        return
    for name, row in result.items():
        print(f"{name}: {row}")


if __name__ == "__main__":
    main()
