"""From a batch's detections on its device to COCO results.

On a GPU the device predicts one batch while the one before is on its way to the host and processes
paste and encode the masks of those before that.

Axes: N detections of one image, M side of a mask, P keypoint types.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.machine.folders import end_with_starter, fork_server
from contract.metrics import result_kinds
from contract.model import ModelConfig
from model.branches.paste import paste_mask
from model.structures import Detections
from pipelines.evaluate.evaluation import encode_crop, image_results

CocoResult: TypeAlias = dict[str, Any]  # one detection in COCO's own JSON
Results: TypeAlias = dict[str, list[CocoResult]]  # by kind: "bbox", "segm", "keypoints", ...
Floats: TypeAlias = NDArray[np.float32]

_BATCHES_AT_ONCE = 2  # in the processes; it bounds the masks that are alive


class Encoder:
    """Makes COCO results of batches, in the order in which they are given.

    A batch waits for its copy, and for its processes, when a later one is given or at the end.
    """

    def __init__(
        self, model: ModelConfig, category_ids: Sequence[int], pool: Executor | None = None
    ) -> None:
        """pool: pastes and encodes the images; None does it here. Whoever made it ends it."""
        self._encode = partial(_results, tuple(result_kinds(model)), tuple(category_ids))
        self._pool = pool
        self._copy: HostCopy | None = None
        self._encoding: deque[list[Future[Results]]] = deque()
        self._results: Results = {kind: [] for kind in result_kinds(model)}

    def add(self, detections: Detections) -> None:
        """Takes a batch, and goes on with the one before."""
        copy = HostCopy(detections)
        self._go_on()
        self._copy = copy

    def finish(self) -> Results:
        """The results of all batches."""
        self._go_on()
        self._collect(0)
        return self._results

    def _go_on(self) -> None:
        if self._copy is None:
            return
        images = _images(self._copy.wait())
        self._copy = None
        if self._pool is None:
            for image in images:
                self._keep(self._encode(image))
        else:
            self._encoding.append([self._pool.submit(self._encode, image) for image in images])
            self._collect(_BATCHES_AT_ONCE)

    def _collect(self, left: int) -> None:
        while len(self._encoding) > left:
            for future in self._encoding.popleft():
                self._keep(future.result())

    def _keep(self, results: Results) -> None:
        for kind, of_kind in results.items():
            self._results[kind] += of_kind


def coco_results(
    model: ModelConfig, detections: Detections, category_ids: Sequence[int]
) -> Results:
    """The detections of a batch as COCO results of every kind that the model is scored on."""
    encoder = Encoder(model, category_ids)
    encoder.add(detections)
    return encoder.finish()


# --- to the host ----------------------------------------------------------------------------------


class HostCopy:
    """Detections on their way to the host, in one copy that nobody waits for until `wait`."""

    def __init__(self, detections: Detections) -> None:
        self._detections = detections
        self._event: torch.cuda.Event | None = None
        if detections.valid.device.type == "cuda":
            packed, layout = _packed(detections)
            # torch takes pinned memory for it, so that the host goes on
            self._detections = _unpacked(packed.to("cpu", non_blocking=True), detections, layout)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> Detections:
        """The detections on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._detections


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in the packed bytes."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


def _packed(detections: Detections) -> tuple[Tensor, dict[str, _Place]]:
    """All tensors as bytes one after the other, and the place of each by its name."""
    # the widest types first, so that each tensor starts at a multiple of its type's size
    tensors = sorted(_named(detections).items(), key=lambda item: -item[1].itemsize)
    layout, end = {}, 0
    for name, tensor in tensors:
        layout[name] = _Place(end, tensor.shape, tensor.dtype)
        end += tensor.nbytes
    return torch.cat([t.contiguous().flatten().view(torch.uint8) for _, t in tensors]), layout


def _unpacked(packed: Tensor, like: Detections, layout: Mapping[str, _Place]) -> Detections:
    tensors = {
        name: packed[place.start : place.start + place.shape.numel() * place.dtype.itemsize]
        .view(place.dtype)
        .view(place.shape)
        for name, place in layout.items()
    }
    masks = {name: tensors.pop(_MASKS + name) for name in like.masks}
    return replace(like, masks=masks, **tensors)


_MASKS = "masks/"


def _named(detections: Detections) -> dict[str, Tensor]:
    own = {n: value for n, value in vars(detections).items() if isinstance(value, Tensor)}
    return own | {_MASKS + name: masks for name, masks in detections.masks.items()}


# --- to results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """The detections of one image as in `Detections`, without padding.

    boxes_xyxy: (N, 4). scores, labels: (N,). masks: (N, M, M) by inference. keypoints: (N, P, 3).
    """

    image_id: int
    height: int
    width: int
    boxes_xyxy: Floats
    scores: Floats
    labels: NDArray[np.int64]
    masks: dict[str, Floats]
    keypoints: Floats


def _images(batch: Detections) -> list[_Image]:
    images = []
    for index, image_id in enumerate(batch.sample_ids.tolist()):
        kept = batch.valid[index]  # the rest of a row is padding
        height, width = batch.image_sizes[index].tolist()
        images.append(
            _Image(
                image_id,
                height,
                width,
                batch.boxes_xyxy[index, kept].numpy(),
                batch.scores[index, kept].numpy(),
                batch.labels[index, kept].numpy(),
                {name: masks[index, kept].float().numpy() for name, masks in batch.masks.items()},
                batch.keypoints[index, kept].numpy(),
            )
        )
    return images


def _results(kinds: Sequence[str], category_ids: Sequence[int], image: _Image) -> Results:
    results: Results = {kind: [] for kind in kinds}
    of_kind = partial(
        image_results,
        image.image_id,
        image.boxes_xyxy,
        image.scores,
        image.labels,
        category_ids,
    )
    results["bbox"] = of_kind()
    for number, (name, masks_NMM) in enumerate(image.masks.items()):
        # the first inference is the one that the model is known by: it counts as "segm", too
        named = [f"segm-{name}", "segm"] if number == 0 else [f"segm-{name}"]
        wanted = [kind for kind in named if kind in results]
        if wanted:
            rles = [
                _encoded(mask, box, image.height, image.width)
                for mask, box in zip(
                    torch.from_numpy(masks_NMM), torch.from_numpy(image.boxes_xyxy), strict=True
                )
            ]
            for kind in wanted:
                results[kind] = of_kind(rles=rles)
    if "keypoints" in results:
        results["keypoints"] = of_kind(keypoints=image.keypoints)
    return results


def _encoded(mask_MM: Tensor, box_xyxy: Tensor, height: int, width: int) -> CocoResult:
    # encoded at once: full-size masks of all detections would fill the memory
    crop, top, left = paste_mask(mask_MM, box_xyxy, height, width)
    return encode_crop(crop.numpy(), top, left, height, width)


# --- processes ------------------------------------------------------------------------------------


class EncodingProcesses:
    """A pool for `Encoder`. At the end of its block nothing of it runs any more."""

    def __init__(self, num_processes: int) -> None:
        # as the loader's workers, from a fork server that has done nothing but import
        context = fork_server(["pipelines.load.loader", __name__])
        self._pool = ProcessPoolExecutor(num_processes, context, initializer=_begin)

    def __enter__(self) -> Executor:
        return self._pool

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # a stop or an error: nobody wants what has not begun
        self._pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Runs first in each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when an evaluation ends
    torch.set_num_threads(1)
    end_with_starter()  # an executor's process would wait for ever for a killed trainer
