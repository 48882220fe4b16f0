"""Fixed proposals by image id, as the paper's comparisons share them.

They are in one Arrow file, which is read without copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from contract.files import Files, split
from pipelines.shards.mapping import view

_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("boxes_xyxy", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
    ],
    metadata={"maskray": "proposals 1"},
)
_ROWS_PER_BATCH = 256  # images

Boxes = NDArray[np.float32]


def write_proposals(
    uri: str, rows: Iterable[tuple[int, Boxes, Boxes]], max_per_image: int = 1000
) -> int:
    """Writes the proposals of each image, best first; returns how many images there are.

    rows: (image id, boxes (Q, 4) in pixels of the image file, scores (Q,)). Raises ValueError if an
    image is there twice.
    """
    # Sorted by id: the bytes do not depend on the order in which ranks deliver, and `get` searches.
    ordered = sorted(rows, key=lambda row: row[0])
    ids = [int(row[0]) for row in ordered]
    if len(set(ids)) < len(ids):
        twice = next(a for a, b in itertools.pairwise(ids) if a == b)
        raise ValueError(f"{uri}: proposals of image {twice} are there twice; give each image once")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(ordered), _ROWS_PER_BATCH):
            writer.write_batch(_batch(ordered[start : start + _ROWS_PER_BATCH], max_per_image))
    folder, name = split(uri)
    Files(folder).write(name, sink.getvalue().to_pybytes())
    return len(ordered)


def _batch(rows: list[tuple[int, Boxes, Boxes]], most: int) -> pa.RecordBatch:
    kept = []
    for image_id, boxes, scores in rows:
        # Stable: equal scores keep the order in which the RPN gave them.
        best = np.argsort(-np.asarray(scores, np.float32), kind="stable")[:most]
        kept.append(
            (image_id, np.asarray(boxes, np.float32)[best], np.asarray(scores, np.float32)[best])
        )
    offsets = np.cumsum([0] + [len(scores) for _, _, scores in kept]).astype(np.int32)
    boxes = np.concatenate([b for _, b, _ in kept]).reshape(-1, 4)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4)
    columns = [
        pa.array([image_id for image_id, _, _ in kept], pa.int64()),
        pa.ListArray.from_arrays(pa.array(offsets), flat),
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.concatenate([s for _, _, s in kept]))
        ),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


class ProposalTable:
    """Proposals of a file or URI. Holds only the URI until it is used, so it can be pickled."""

    def __init__(self, uri: str):
        self.uri = uri

    def __reduce__(self) -> tuple[type[ProposalTable], tuple[str]]:
        return ProposalTable, (self.uri,)

    @cached_property
    def _table(
        self,
    ) -> tuple[
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int64],
        list[tuple[Boxes, Boxes, NDArray[np.int32]]],
    ]:
        folder, name = split(self.uri)
        store = Files(folder)
        if store.size(name) is None:
            raise ValueError(
                f'{self.uri}: no such file of proposals; write it with "maskray proposals"'
            )
        try:
            source = (
                pa.memory_map(store.path(name)) if store.local else pa.py_buffer(store.read(name))
            )
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f'{self.uri}: not a file of proposals ({error}); write it with "maskray proposals"'
            ) from None
        # An empty array first: a file may have no batch, and nothing cannot be concatenated.
        batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
        ids = np.concatenate([np.zeros(0, np.int64)] + [view(b["image_id"]) for b in batches])
        # For each image: its record batch, and its row there.
        number = np.repeat(np.arange(len(batches)), [b.num_rows for b in batches])
        local = np.concatenate([np.zeros(0, np.int64)] + [np.arange(b.num_rows) for b in batches])
        return ids, number, local, [_views(b) for b in batches]

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Ascending."""
        return self._table[0]

    @cached_property
    def most(self) -> int:
        """The largest number of proposals of an image."""
        return max(
            (int(np.diff(offsets).max(initial=0)) for _, _, offsets in self._table[3]), default=0
        )

    def check_covers(self, image_ids: NDArray[np.int64]) -> None:
        """Raises ValueError if some image has no entry."""
        missing = np.setdiff1d(image_ids, self.image_ids)
        if len(missing):
            raise ValueError(
                f"{self.uri}: no proposals for {len(missing)} of {len(image_ids)} images, the "
                f'first is {missing[0]}; write them for this dataset with "maskray proposals"'
            )

    def get(self, image_id: int) -> tuple[Boxes, Boxes]:
        """Boxes (Q, 4) in pixels of the image file and scores (Q,), best first.

        Raises ValueError if there are none.
        """
        ids, number, local, views = self._table
        place = int(np.searchsorted(ids, image_id))
        if place == len(ids) or ids[place] != image_id:
            raise ValueError(
                f"{self.uri}: no proposals for image {image_id}; write them for this dataset with "
                '"maskray proposals"'
            )
        boxes, scores, offsets = views[number[place]]
        first, last = offsets[local[place]], offsets[local[place] + 1]
        return boxes[first:last], scores[first:last]


def _views(batch: pa.RecordBatch) -> tuple[Boxes, Boxes, NDArray[np.int32]]:
    lists = batch["boxes_xyxy"]
    boxes = view(lists.values.values).reshape(-1, 4)
    return boxes, view(batch["scores"].values), view(lists.offsets)
