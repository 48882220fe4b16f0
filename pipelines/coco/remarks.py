"""What a dataset says oddly and is read all the same: counted by kind, the first few named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

RemarkKind = Literal[
    "rounded",
    "whole_float",
    "text_number",
    "id_zero",
    "renamed_file",
    "stray_bytes",
    "twelve_bits",
    "same_file",
    "exif_applied",
    "exif_ignored",
    "box_off_mask",
    "flat_mask",
    "box_over_edge",
    "no_mask",
    "bare_polygon",
    "all_crowds",
    "heading",
    "unlabelled",
    "same_image",
    "licence",
]
EXAMPLES = 3  # of each kind; the rest is counted

# What one line says of a kind, after the count. `{s}` is the plural's letter.
_WORDS: dict[RemarkKind, str] = {
    "rounded": "number{s} differ in their last digits between the files; the first file's is kept",
    "whole_float": "record{s} with a whole number written as a float (7.0), read as 7",
    "text_number": "record{s} with a whole number written as text, read as the number",
    "id_zero": "annotation{s} of id 0, which evaluation renumbers",
    "renamed_file": "image{s} found under the name that their file_name means",
    "stray_bytes": "JPEG{s} that libjpeg reads with a warning",
    "twelve_bits": "16-bit PNG{s} whose brightest value is below 4096: they train dark; scale them",
    "same_file": "image{s} whose file another image has too",
    "exif_applied": "image{s} turned by their EXIF orientation",
    "exif_ignored": "image{s} with an EXIF orientation that is not applied",
    "box_off_mask": "box{es} far from the mask of their object",
    "flat_mask": "mask{s} without area, as of a flat polygon: a box and no mask trains",
    "box_over_edge": "box{es} that reach over the edge of their image, clipped in training",
    "no_mask": "object{s} without a mask in a dataset with masks: a box and no mask trains",
    "bare_polygon": "mask{s} written as one list of numbers, read as one polygon",
    "all_crowds": "annotation{s}, all with iscrowd 1: nothing trains; write 0 for single objects",
    "heading": "categor{y} without objects that only head others: name those in "
    "data.filter.categories, or each counts in model.num_classes",
    "unlabelled": "categor{y} that one of the datasets does not label: there it trains as "
    "background",
    "same_image": "image{s} that an earlier dataset has too (equal size and CRC-32): it trains "
    "twice",
    "licence": "licence id{s} that mean another licence in another dataset",
}


class Remark(BaseModel):
    """How often something odd was read, and the first few places."""

    model_config = ConfigDict(frozen=True)

    kind: RemarkKind
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = _WORDS[self.kind].replace("{s}", "s" * (self.count > 1))
        words = words.replace("{es}", "es" * (self.count > 1))
        words = words.replace("{y}", "ies" if self.count > 1 else "y")
        shown = f" ({'; '.join(self.examples)}{'; ...' if self._more else ''})"
        return f"{self.count} {words}{shown if self.examples else ''}"

    @property
    def _more(self) -> bool:
        return self.count > len(self.examples)


class Remarks:
    """Collects remarks."""

    def __init__(self) -> None:
        self._of: dict[RemarkKind, Remark] = {}

    def add(self, kind: RemarkKind, example: str = "", count: int = 1) -> None:
        examples = (example,) if example else ()
        self.join([Remark(kind=kind, count=count, examples=examples)])

    def join(self, remarks: Iterable[Remark]) -> None:
        for remark in remarks:
            before = self._of.get(remark.kind, Remark(kind=remark.kind, count=0))
            examples = (*before.examples, *remark.examples)[:EXAMPLES]
            count = before.count + remark.count
            self._of[remark.kind] = Remark(kind=remark.kind, count=count, examples=examples)

    def all(self) -> tuple[Remark, ...]:
        """One of each kind that was seen, in the order of `RemarkKind`."""
        return tuple(self._of[kind] for kind in _WORDS if kind in self._of)
