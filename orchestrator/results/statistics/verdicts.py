"""The word that an interval allows: one interval decides all of them."""

from __future__ import annotations

import math
from typing import Literal

Verdict = Literal[
    "",
    "better",
    "worse",
    "equivalent",
    "better, by less than the margin",
    "worse, by less than the margin",
    "not resolved",
]


def verdict_of(low: float, high: float, margin: float = 0.0) -> Verdict:
    """The verdict on a difference whose interval is `low` to `high`.

    margin: a difference inside it is of no matter; 0 asks for no equivalence. Empty without an
    interval.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    inside = margin > 0 and -margin < low and high < margin
    if low > 0:
        return "better, by less than the margin" if inside else "better"
    if high < 0:
        return "worse, by less than the margin" if inside else "worse"
    return "equivalent" if inside else "not resolved"
