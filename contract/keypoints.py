"""Which keypoint takes the place of which in a mirrored image."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A side as a word of its own, or as the letter L or R between separators or at a hump: left_eye,
# eyeRight, L-ear, ear.r, lKnee, kneeL. The words first: they are the surest.
_SIDES = (
    re.compile(r"left|right", re.IGNORECASE),
    re.compile(r"(?<![A-Za-z])(?:[lr](?![a-z])|[LR](?![A-Za-z])|[LR](?=[A-Z][a-z]))"),
    re.compile(r"(?<=[a-z])[LR](?![A-Za-z])"),
)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}
_REMEDY = (
    "name the pairs in data.flip_pairs ([[left_name, right_name], ...], or [] if none swaps), or "
    "set data.flip_probability to 0"
)


def mirrored(names: Sequence[str], pairs: Sequence[tuple[str, str]] | None) -> tuple[int, ...]:
    """For each keypoint the index of the one whose place it takes in a mirrored image.

    pairs: names that change places; None to find them by the sides in the names. Raises ValueError
    where a side has no partner, or no name has a side: such an image would be mirrored wrongly.
    """
    place = {name: number for number, name in enumerate(names)}
    if pairs is not None:
        return _of_pairs(place, pairs)
    partners = [_partner(name, place) for name in names]
    alone = [name for name, partner in zip(names, partners, strict=True) if partner == ""]
    if alone:
        raise ValueError(f"keypoint {alone[0]!r} has a side and no partner on the other; {_REMEDY}")
    if len(names) > 1 and not any(partners):
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ValueError(f"no side in the names of the keypoints ({shown}); {_REMEDY}")
    return tuple(
        place[partner] if partner else place[name]
        for name, partner in zip(names, partners, strict=True)
    )


def _of_pairs(place: dict[str, int], pairs: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    swapped = list(range(len(place)))
    for one, two in pairs:
        for name in (one, two):
            if name not in place:
                raise ValueError(
                    f"data.flip_pairs: no keypoint {name!r} in the data; there are "
                    f"{', '.join(place)}"
                )
        swapped[place[one]], swapped[place[two]] = place[two], place[one]
    if sorted(swapped) != list(range(len(place))):
        raise ValueError("data.flip_pairs: a keypoint stands in two pairs; give it one partner")
    return tuple(swapped)


def _partner(name: str, place: dict[str, int]) -> str | None:
    """The name on the other side; None without a side, "" where there is no such name."""
    for pattern in _SIDES:
        for side in pattern.finditer(name):
            other = name[: side.start()] + _swapped(side.group()) + name[side.end() :]
            if other in place:
                return other
    # A letter without a partner is no side: vertebrae are called L1 to L5.
    return "" if _SIDES[0].search(name) else None


def _swapped(side: str) -> str:
    other = _OTHER[side.lower()]
    if side.isupper():
        return other.upper()
    return other.capitalize() if side[0].isupper() else other
