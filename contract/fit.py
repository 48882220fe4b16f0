"""Does the model of a run fit its datasets? Every way to start a run asks this one function."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TypeAlias

from pydantic import TypeAdapter

from contract.data import DataConfig, ManifestHeader
from contract.model import KeypointBranch, MaskBranch
from contract.recipe import RunConfig
from contract.record import Message, nearest

Pairs: TypeAlias = tuple[tuple[str, str], ...]  # names of keypoints, left and right


class Category(Message):
    """What the checks need of a COCO category; its other fields are the dataset's own."""

    name: str
    keypoints: tuple[str, ...] | None = None  # None in a dataset without keypoints
    flip_pairs: Pairs | None = None


_CATEGORIES = TypeAdapter(tuple[Category, ...])


def categories_of(header: ManifestHeader) -> tuple[Category, ...]:
    """The categories in the order of their dense labels. Raises ValueError for what is none."""
    return _CATEGORIES.validate_python(header.categories)


def check_fit(run: RunConfig, train: ManifestHeader, val: ManifestHeader) -> None:
    """Raises ValueError with the remedy where the model asks for what the data does not hold."""
    ours, theirs = categories_of(train), categories_of(val)
    names, val_names = ([category.name for category in c] for c in (ours, theirs))
    _check_same_names(run, names, val_names)
    for field, uri, header in _both(run, train, val):
        if header.num_images == 0:
            raise ValueError(f"{field}: {uri} has no images")
    wanted = run.data.filter.categories
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"data.filter.categories: no category {name!r} in the dataset; "
                f"{nearest(name, names)}"
            )
    kept = [category for category in ours if not wanted or category.name in wanted]
    if run.model.num_classes != len(kept):
        after = " after data.filter.categories" if wanted else ""
        choice = _without_headings(train, run.model.num_classes) if not wanted else ""
        raise ValueError(
            f"model.num_classes is {run.model.num_classes}, {run.data.train} has {len(kept)} "
            f"categories{after} ({_listed([c.name for c in kept])}); set model.num_classes="
            f"{len(kept)}, or choose categories with data.filter.categories{choice}"
        )
    for field, uri, header in _both(run, train, val):
        if isinstance(run.model.mask, MaskBranch) and not header.has_masks:
            raise ValueError(
                f"model.mask: {field} ({uri}) has no masks; set model.mask.kind to 'none', or pack "
                "annotations with masks"
            )
    if isinstance(run.model.keypoints, KeypointBranch):
        for field, uri, header in _both(run, train, val):
            _check_keypoints(run, run.model.keypoints, field, uri, header)


def same_data(run: RunConfig, train_hash: str, val_hash: str) -> str:
    """What is doubtful about validating on the training data, or "" where the two differ.

    hashes: of the manifests, which are equal for the same images wherever they lie.
    """
    if train_hash != val_hash or run.data.filter.holdout:
        return ""
    return (
        f"data.val is data.train ({run.data.val}): AP then says how well the training images are "
        "known by heart; pack a validation set, or hold out a part with data.filter.holdout"
    )


def _both(
    run: RunConfig, train: ManifestHeader, val: ManifestHeader
) -> list[tuple[str, str, ManifestHeader]]:
    return [("data.train", run.data.train, train), ("data.val", run.data.val, val)]


def _without_headings(header: ManifestHeader, num_classes: int) -> str:
    """The value of the filter that leaves out categories that only head others.

    Some tools write the name of the project as one. Empty where that gives another number.
    """
    heads = [
        record.get("supercategory")
        for record in header.categories
        if record.get("supercategory") != record["name"]
    ]
    names = [record["name"] for record in header.categories if record["name"] not in heads]
    return f"={json.dumps(names, ensure_ascii=False)}" if len(names) == num_classes else ""


def _check_same_names(run: RunConfig, names: Sequence[str], val_names: Sequence[str]) -> None:
    """Categories are the same by name; ids and their order are each file's own affair."""
    if sorted(names) != sorted(val_names):
        raise ValueError(
            f"data.val: {run.data.val} has other categories than data.train "
            f"({_listed(val_names)}; {_listed(names)}); pack both from annotations with the same "
            "categories"
        )
    # A name that two categories share says nothing of which is which.
    if len(set(names)) < len(names) and list(names) != list(val_names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"data.val: {run.data.val} lists its categories in another order than data.train, and "
            f"{twice!r} names two of them; give each category a name of its own"
        )


def _check_keypoints(
    run: RunConfig, branch: KeypointBranch, field: str, uri: str, header: ManifestHeader
) -> None:
    wanted = run.data.filter.categories
    named = [
        category
        for category in categories_of(header)
        if category.keypoints and (not wanted or category.name in wanted)
    ]
    if not header.has_keypoints:
        raise ValueError(
            f"model.keypoints: {field} ({uri}) has no keypoints; pack it with keypoint "
            "annotations, or set model.keypoints.kind to 'none'"
        )
    # One tensor holds the keypoints of all objects, so their categories must share the names.
    points = named[0].keypoints if named else None
    if points is None or any(category.keypoints != points for category in named):
        counts = sorted({len(category.keypoints or ()) for category in named})
        raise ValueError(
            f"model.keypoints: {field} ({uri}) has categories with different keypoints "
            f"({', '.join(map(str, counts)) or 'none named'}); choose one kind of object with "
            "data.filter.categories"
        )
    if branch.num_keypoints != len(points):
        raise ValueError(
            f"model.keypoints.num_keypoints is {branch.num_keypoints}, {field} ({uri}) has "
            f"{len(points)}; set it to {len(points)}"
        )
    if run.data.oks_sigmas and len(run.data.oks_sigmas) != len(points):
        raise ValueError(
            f"data.oks_sigmas has {len(run.data.oks_sigmas)} numbers, {field} ({uri}) has "
            f"{len(points)} keypoints; give one for each"
        )
    if run.data.flip_probability > 0:
        mirrored(points, flip_pairs(run.data, named[0].flip_pairs))


def flip_pairs(cfg: DataConfig, own: Pairs | None) -> Pairs | None:
    """The run's pairs, else the category's `own`; None to find them by name."""
    return own if cfg.flip_pairs is None else cfg.flip_pairs


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ..." if len(names) > 4 else shown


# --- keypoints of a mirrored image ---

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
    if len(place) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"two keypoints are called {twice!r}; give each a name of its own")
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


def flip_in_words(names: Sequence[str], partners: Sequence[int]) -> str:
    """ "a flip swaps left_eye with right_eye and leaves nose in place"

    For a person to read: a side in another language is one that `mirrored` does not see.
    """
    swapped = [f"{names[a]} with {names[b]}" for a, b in enumerate(partners) if a < b]
    stays = [name for number, name in enumerate(names) if partners[number] == number]
    parts = [f"swaps {', '.join(swapped)}"] if swapped else []
    parts += [f"leaves {', '.join(stays)} in place"] if stays else []
    return f"a flip {' and '.join(parts)}"


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
