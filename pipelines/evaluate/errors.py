"""What kinds of mistakes detections make, and what each kind costs (TIDE, Bolya et al. 2020).

A kind's cost is the AP50 that one would gain if it alone were put right. The costs do not add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = Literal[
    "classification", "localisation", "both", "duplicate", "background", "missed"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # section 3.1
_RECALLS = np.linspace(0, 1, 101)  # COCO's

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ImageMatches:
    """One image: D detections, best first, and T true objects that count.

    iou: (D, T). labels_D, labels_T: categories. ignored_D: the detection lies on a crowd.
    """

    scores_D: Floats
    labels_D: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    iou_DT: Floats
    ignored_D: NDArray[np.bool_]


class Found(NamedTuple):
    """One detection. kind: None if it is right. better: the category with which it would be right,
    -1 where putting it right means to remove it."""

    score: float
    label: int
    kind: Kind | None
    better: int


@dataclass
class Errors:
    """Adds up images; `costs` then gives AP50 and what each kind costs, as fractions."""

    found: list[Found] = field(default_factory=list)
    truths: Counter[int] = field(default_factory=Counter)  # category -> objects
    missed: Counter[int] = field(default_factory=Counter)  # of them, those that nothing explains

    def add(self, image: ImageMatches) -> None:
        """Classifies each detection that is wrong, and counts the objects that are missed."""
        matched = _matches(image)
        explained = set(matched.tolist())
        taken = frozenset(explained)
        for d, label in enumerate(image.labels_D.tolist()):
            kind, better = None, -1
            if matched[d] < 0:
                if image.ignored_D[d]:
                    continue  # on a crowd: neither right nor wrong
                kind, truth = _kind(image, d, taken)
                # Of several, the best one alone would find the object.
                if truth >= 0 and truth not in explained:
                    explained.add(truth)
                    better = int(image.labels_T[truth])
            self.found.append(Found(float(image.scores_D[d]), label, kind, better))
        for t, label in enumerate(image.labels_T.tolist()):
            self.truths[label] += 1
            self.missed[label] += t not in explained

    def costs(self) -> tuple[float, dict[Kind, float]]:
        """AP50, and by kind what is gained if it is put right."""
        ordered = sorted(self.found, key=lambda one: -one.score)
        base = self._ap(ordered)
        return base, {kind: self._ap(ordered, kind) - base for kind in KINDS}

    def _ap(self, ordered: Sequence[Found], repaired: Kind | None = None) -> float:
        """The mean over categories with objects, on COCO's 101 points of recall."""
        hits: dict[int, list[bool]] = {}
        for one in ordered:
            if one.kind is None or one.kind != repaired:
                hits.setdefault(one.label, []).append(one.kind is None)
            elif one.better >= 0:
                hits.setdefault(one.better, []).append(True)
        gone = self.missed if repaired == "missed" else Counter[int]()
        values = [
            _average_precision(hits.get(label, []), count - gone[label])
            for label, count in self.truths.items()
        ]
        return sum(values) / len(values) if values else 0.0


def _matches(image: ImageMatches) -> NDArray[np.int64]:
    """For each detection the object of its class that it finds, -1 for none; best score first."""
    matched = np.full(len(image.labels_D), -1, np.int64)
    free = np.ones(len(image.labels_T), bool)
    for d, label in enumerate(image.labels_D):
        overlap = np.where(free & (image.labels_T == label), image.iou_DT[d], -1.0)
        if len(overlap) and overlap.max() >= FOREGROUND_IOU:
            matched[d] = int(overlap.argmax())
            free[matched[d]] = False
    return matched


def _kind(image: ImageMatches, d: int, taken: Collection[int]) -> tuple[Kind, int]:
    """The kind of a detection that finds nothing, and the object that it means or -1.

    In the order of the authors' program: a box that only lies badly comes first.
    """
    if not len(image.labels_T):
        return "background", -1
    iou, own = image.iou_DT[d], image.labels_T == image.labels_D[d]
    best_own, best_other = np.where(own, iou, -1.0), np.where(own, -1.0, iou)
    if BACKGROUND_IOU <= best_own.max() <= FOREGROUND_IOU:
        return "localisation", int(best_own.argmax())
    if best_other.max() >= FOREGROUND_IOU:
        return "classification", int(best_other.argmax())
    if best_own.max() >= FOREGROUND_IOU and int(best_own.argmax()) in taken:
        return "duplicate", -1
    return ("background" if iou.max() <= BACKGROUND_IOU else "both"), -1


def _average_precision(hits: Sequence[bool], objects: int) -> float:
    if objects <= 0 or not hits:
        return 0.0
    good = np.cumsum(np.asarray(hits, np.float64))
    precision = good / np.arange(1, len(hits) + 1)
    # the best precision at this recall or a higher one
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(good / objects, _RECALLS, side="left")
    padded = np.append(precision, 0.0)
    return float(padded[np.minimum(places, len(hits))].mean())
