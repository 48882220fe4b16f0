"""Matching and sampling of boxes on a GPU in at most six small launches and without a sync.

No list of all boxes by all objects exists, and no list of noise: both are computed where they are
read. A histogram of the noise finds the few boxes that can be drawn, and those are ranked.

Axes: B images, N boxes, G padded objects, S slots an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model import matching, sample_hash
from model.matching import Chosen, Rule, Sample

_GOLDEN = tl.constexpr(sample_hash.GOLDEN % 2**64)
_MIX_1 = tl.constexpr(sample_hash.MIX_1 % 2**64)
_MIX_2 = tl.constexpr(sample_hash.MIX_2 % 2**64)
# The smallest normal float in all its digits: Triton takes a smaller constant as a float64.
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
_NOISE_MASK = tl.constexpr(2**62 - 1)
# The first 11 bits of noise number its bin: 131 of 268,569 anchors share one.
_BIN_SHIFT = tl.constexpr(62 - 11)
_BINS = tl.constexpr(2**11)
_COUNTERS = tl.constexpr(2 * 2**11 + 2)  # two histograms of an image and the lengths of two lists
_BLOCK = 1024  # boxes of a program
_RANKED = 64  # boxes that a program ranks at once
_PARTS = 8  # programs that share the ranking of an image


class MatchedSampling(nn.Module):
    """`model.matching.MatchedSampling` by our kernels."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(
        self,
        boxes_BN4: Tensor,
        eligible_BN: Tensor | None,
        identity_BN: Tensor | None,
        objects_BG4: Tensor,
        valid_BG: Tensor,
        noise_keys_B: Tensor,
    ) -> Chosen:
        """As torch's, equal to the bit in every valid slot; padding is box 0 and object 0."""
        rule = self.rule
        slots, most_positives = rule.shape(boxes_BN4.shape[1])
        # Only a compiler needs the operator; without one it costs the host some microseconds.
        choose = _operator if torch.compiler.is_compiling() else _choose
        index, valid, positive, objects, noise = choose(
            boxes_BN4,
            eligible_BN,
            identity_BN,
            objects_BG4,
            valid_BG,
            noise_keys_B,
            slots,
            most_positives,
            rule.positive_iou,
            rule.negative_iou,
            rule.best_is_positive,
            rule.stream,
        )
        return Chosen(Sample(index, valid, positive, most_positives), objects, noise)


def trial() -> bool:
    """Whether the kernels choose as torch does: more boxes than one program has."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 3000, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 10], dim=2)
    given = (boxes, None, None, boxes[:, :3].expand(2, -1, -1))
    valid, keys = torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([5, 6])
    rule = Rule(64, 0.5, 0.7, 0.3, True, 1)
    expected = matching.MatchedSampling(rule)(*given, valid, keys)
    on_gpu = [None if value is None else value.cuda() for value in (*given, valid, keys)]
    found = MatchedSampling(rule)(*on_gpu)
    return all(
        torch.equal(ours.cpu(), theirs)
        for ours, theirs in (
            (found.sample.index, expected.sample.index),
            (found.sample.positive, expected.sample.positive),
            (found.object_BS, expected.object_BS),
            (found.noise_BS, expected.noise_BS),
        )
    )


def _choose(
    boxes: Tensor,
    eligible: Tensor | None,
    identity: Tensor | None,
    objects: Tensor,
    there: Tensor,
    keys: Tensor,
    slots: int,
    most_positives: int,
    positive_iou: float,
    negative_iou: float,
    best_is_positive: bool,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index, valid, positive, object and noise of each slot."""
    boxes, objects = boxes.contiguous(), objects.contiguous()
    there, keys = there.contiguous().view(torch.uint8), keys.contiguous()
    eligible = there if eligible is None else eligible.contiguous().view(torch.uint8)
    has_identity = identity is not None
    identity = keys if identity is None else identity.contiguous()
    images, num_objects = there.shape
    num_boxes, shared = boxes.shape[1], boxes.shape[0] == 1
    index, valid, positive, chosen_object, noise = result = _empty(boxes, keys, slots)
    if not index.numel():
        return result
    # The counters of each image and, of its objects, the highest IoU as the bits of a float.
    zeros = boxes.new_zeros(images, _COUNTERS.value + num_objects, dtype=torch.int32)
    marks = boxes.new_empty(images, num_boxes, dtype=torch.int16)
    matches, candidates = boxes.new_empty(2, images, num_boxes, dtype=torch.int32)
    grid = (triton.cdiv(num_boxes, _BLOCK), images)
    given = (boxes, objects, there, zeros, num_boxes, num_objects)
    # No fused multiply-add: a product and a sum in one round differently, and ties would fall
    # apart.
    if best_is_positive:
        _find_highest[grid](*given, shared, _BLOCK, enable_fp_fusion=False)
    seed = stream * sample_hash.STREAM_STEP % 2**64
    _mark[grid](
        *given,
        eligible,
        identity,
        keys,
        marks,
        matches,
        positive_iou,
        negative_iou,
        seed,
        shared,
        best_is_positive,
        eligible is not there,
        has_identity,
        _BLOCK,
        enable_fp_fusion=False,
    )
    sizes = (num_boxes, num_objects, slots, most_positives)
    _collect[grid](zeros, marks, candidates, *sizes, _BLOCK)
    _rank[(images, 2, _PARTS)](
        zeros,
        candidates,
        matches,
        identity,
        keys,
        index,
        valid.view(torch.uint8),
        positive.view(torch.uint8),
        chosen_object,
        noise,
        *sizes,
        seed,
        has_identity,
        _RANKED,
        _PARTS,
    )
    return result


_operator = torch.library.custom_op("maskray::matched_sampling", _choose, mutates_args=())


@_operator.register_fake
def _fake(
    boxes: Tensor,
    eligible: Tensor | None,  # noqa: ARG001 - as `_choose`
    identity: Tensor | None,  # noqa: ARG001
    objects: Tensor,  # noqa: ARG001
    there: Tensor,  # noqa: ARG001
    keys: Tensor,
    slots: int,
    most_positives: int,  # noqa: ARG001
    positive_iou: float,  # noqa: ARG001
    negative_iou: float,  # noqa: ARG001
    best_is_positive: bool,  # noqa: ARG001
    stream: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(boxes, keys, slots)


def _empty(
    boxes: Tensor, keys: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    index, objects, noise = (boxes.new_empty(len(keys), slots, dtype=torch.int64) for _ in range(3))
    valid, positive = (boxes.new_empty(len(keys), slots, dtype=torch.bool) for _ in range(2))
    return index, valid, positive, objects, noise


@triton.jit
def _box(boxes, place, there):  # type: ignore[no-untyped-def]
    """The sides of boxes: x0, y0, x1, y1 and the area."""
    first = boxes + place * 4
    x0, y0 = tl.load(first, there, 0.0), tl.load(first + 1, there, 0.0)
    x1, y1 = tl.load(first + 2, there, 0.0), tl.load(first + 3, there, 0.0)
    return x0, y0, x1, y1, tl.maximum(x1 - x0, 0.0) * tl.maximum(y1 - y0, 0.0)


@triton.jit
def _shared(ax0, ay0, ax1, ay1, bx0, by0, bx1, by1):  # type: ignore[no-untyped-def]
    """The area that boxes share."""
    wide = tl.maximum(tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0), 0.0)
    high = tl.maximum(tl.minimum(ay1, by1) - tl.maximum(ay0, by0), 0.0)
    return wide * high


@triton.jit
def _iou(shared, area_a, area_b):  # type: ignore[no-untyped-def]
    # The quotient rounds as torch's does, so that ties fall alike.
    return tl.div_rn(shared, tl.maximum(area_a + area_b - shared, _SMALLEST))


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _noise(key, seed, identity):  # type: ignore[no-untyped-def]
    """`sample_hash.noise` of one key, in unsigned numbers."""
    start = _mix(key.to(tl.uint64, bitcast=True) + seed)
    number = _mix(start + identity.to(tl.uint64, bitcast=True) * _GOLDEN)
    return number & _NOISE_MASK


@triton.jit  # type: ignore[untyped-decorator]
def _find_highest(  # type: ignore[no-untyped-def]
    boxes, objects, object_there, zeros, num_boxes, num_objects, SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest IoU of each object with any box."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = 0 if SHARED else image * num_boxes
    x0, y0, x1, y1, area = _box(boxes, start + place, place < num_boxes)
    histogram = zeros + image * (_COUNTERS + num_objects)
    highest = histogram + _COUNTERS
    for number in range(num_objects):
        own = image * num_objects + number
        if tl.load(object_there + own) != 0:
            ox0, oy0, ox1, oy1, object_area = _box(objects, own, True)
            shared = _shared(ox0, oy0, ox1, oy1, x0, y0, x1, y1)
            # Most programs stop here: their boxes are far from the object.
            if tl.max(shared, axis=0) > 0:
                most = tl.max(_iou(shared, object_area, area), axis=0)
                # Floats that are not negative are in the order of their bits, and a maximum does
                # not depend on the order of programs.
                tl.atomic_max(highest + number, most.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    boxes, objects, object_there, zeros, num_boxes, num_objects, eligible, identity, keys, marks,
    matches, positive_iou, negative_iou, SEED: tl.constexpr, SHARED: tl.constexpr,
    BEST: tl.constexpr, ELIGIBLE: tl.constexpr, IDENTITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The object of each box, and 1 + its bin of noise if it is positive, -1 - bin if negative."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, own_place = place < num_boxes, image * num_boxes + place
    x0, y0, x1, y1, area = _box(boxes, place if SHARED else own_place, there)
    histogram = zeros + image * (_COUNTERS + num_objects)
    highest = histogram + _COUNTERS
    best_iou = tl.zeros((BLOCK,), tl.float32)
    best_object = tl.zeros((BLOCK,), tl.int32)
    is_best = tl.zeros((BLOCK,), tl.int32)
    for number in range(num_objects):
        own = image * num_objects + number
        if tl.load(object_there + own) != 0:
            ox0, oy0, ox1, oy1, object_area = _box(objects, own, True)
            shared = _shared(ox0, oy0, ox1, oy1, x0, y0, x1, y1)
            if tl.max(shared, axis=0) > 0:
                iou = _iou(shared, object_area, area)
                better = iou > best_iou
                best_object = tl.where(better, number, best_object)
                best_iou = tl.where(better, iou, best_iou)
                if BEST:
                    most = tl.load(highest + number).to(tl.float32, bitcast=True)
                    is_best |= ((iou == most) & (iou > 0)).to(tl.int32)
    positive = (best_iou >= positive_iou) | (is_best != 0)
    negative = (best_iou < negative_iou) & (positive == 0)
    if ELIGIBLE:
        there = there & (tl.load(eligible + own_place, there, 0) != 0)
    number = place.to(tl.int64)
    if IDENTITY:
        number = tl.load(identity + own_place, there, 0)
    noise = _noise(tl.load(keys + image), SEED, number)
    bin = (noise >> _BIN_SHIFT).to(tl.int32)
    mark = tl.where(positive, 1 + bin, tl.where(negative, -1 - bin, 0))
    mark = tl.where(there, mark, 0)
    tl.store(marks + own_place, mark.to(tl.int16), place < num_boxes)
    tl.store(matches + own_place, best_object, place < num_boxes)
    row = tl.where(mark > 0, bin, _BINS + bin)
    tl.atomic_add(histogram + row, 1, mark != 0)


@triton.jit
def _lowest_bin(counts, wanted):  # type: ignore[no-untyped-def]
    """The lowest bin that so many boxes of the largest noise reach."""
    from_here_up = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    return tl.maximum(tl.sum((from_here_up >= wanted).to(tl.int32), axis=0) - 1, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    zeros, marks, candidates, num_boxes, num_objects, slots, most_positives, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the boxes that may be drawn: positives from the front, negatives from the back."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    histogram = zeros + image * (_COUNTERS + num_objects)
    bins = tl.arange(0, _BINS)
    of_positives, of_negatives = tl.load(histogram + bins), tl.load(histogram + _BINS + bins)
    positives = tl.minimum(tl.sum(of_positives, axis=0), most_positives)
    mark = tl.load(marks + image * num_boxes + place, place < num_boxes, 0).to(tl.int32)
    positive = mark > _lowest_bin(of_positives, positives)
    negative = -mark > _lowest_bin(of_negatives, slots - positives)
    # Their order depends on the order of programs; `_rank` orders them.
    length = histogram + _BINS * 2 + tl.zeros((BLOCK,), tl.int32)
    front = tl.atomic_add(length, 1, positive)
    back = num_boxes - 1 - tl.atomic_add(length + 1, 1, negative)
    tl.store(candidates + image * num_boxes + front, place, positive)
    tl.store(candidates + image * num_boxes + back, place, negative)


@triton.jit  # type: ignore[untyped-decorator]
def _candidates(  # type: ignore[no-untyped-def]
    candidates, identity, key, image, place, length, negative, num_boxes, SEED: tl.constexpr,
    IDENTITY: tl.constexpr,
):  # fmt: skip
    """Boxes of a list of candidates and their noise."""
    there = place < length
    row = tl.where(negative != 0, num_boxes - 1 - place, place)
    box = tl.load(candidates + image * num_boxes + row, there, 0)
    number = box.to(tl.int64)
    if IDENTITY:
        number = tl.load(identity + image * num_boxes + box, there, 0)
    return box, _noise(key, SEED, number), there


@triton.jit  # type: ignore[untyped-decorator]
def _rank(  # type: ignore[no-untyped-def]
    zeros, candidates, matches, identity, keys, index, valid, positive, chosen_object, noise,
    num_boxes, num_objects, slots, most_positives, SEED: tl.constexpr, IDENTITY: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes each candidate to the slot of its rank, if there is one, and zeros to padding."""
    image, negative, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    histogram = zeros + image * (_COUNTERS + num_objects)
    bins, lane, key = tl.arange(0, _BINS), tl.arange(0, BLOCK), tl.load(keys + image)
    positives = tl.minimum(tl.sum(tl.load(histogram + bins), axis=0), most_positives)
    negatives = tl.minimum(tl.sum(tl.load(histogram + _BINS + bins), axis=0), slots - positives)
    most, first = positives, image * slots
    if negative != 0:
        most, first = negatives, image * slots + positives
    length = tl.load(histogram + _BINS * 2 + negative)
    for start in range(part * BLOCK, length, PARTS * BLOCK):
        box, luck, there = _candidates(
            candidates, identity, key, image, start + lane, length, negative, num_boxes, SEED,
            IDENTITY,
        )  # fmt: skip
        rank = tl.zeros((BLOCK,), tl.int32)
        for other_start in range(0, length, BLOCK):
            other, other_luck, other_there = _candidates(
                candidates, identity, key, image, other_start + lane, length, negative, num_boxes,
                SEED, IDENTITY,
            )  # fmt: skip
            ahead = (other_luck[None, :] > luck[:, None]) | (
                (other_luck[None, :] == luck[:, None]) & (other[None, :] < box[:, None])
            )
            rank += tl.sum((ahead & other_there[None, :]).to(tl.int32), axis=1)
        chosen, slot = there & (rank < most), first + rank
        tl.store(index + slot, box.to(tl.int64), chosen)
        tl.store(valid + slot, tl.full((BLOCK,), 1, tl.uint8), chosen)
        tl.store(positive + slot, tl.zeros((BLOCK,), tl.uint8) + (negative == 0), chosen)
        own = tl.load(matches + image * num_boxes + box, chosen, 0)
        tl.store(chosen_object + slot, own.to(tl.int64), chosen)
        tl.store(noise + slot, luck.to(tl.int64), chosen)
    if (negative != 0) & (part == 0):
        for start in range(positives + negatives, slots, BLOCK):
            padding, slot = start + lane < slots, image * slots + start + lane
            tl.store(index + slot, tl.zeros((BLOCK,), tl.int64), padding)
            tl.store(valid + slot, tl.zeros((BLOCK,), tl.uint8), padding)
            tl.store(positive + slot, tl.zeros((BLOCK,), tl.uint8), padding)
            tl.store(chosen_object + slot, tl.zeros((BLOCK,), tl.int64), padding)
            tl.store(noise + slot, tl.zeros((BLOCK,), tl.int64), padding)
