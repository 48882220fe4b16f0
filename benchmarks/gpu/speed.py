"""Images per second on a GPU beside torchvision's Mask R-CNN on the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from benchmarks.gpu.probes import Probe, Scale, Timing, bursts_of, timed
from benchmarks.gpu.work import Work, WorkerStep, batch_of, detector_of
from benchmarks.train_step import make_step, share_weights, sharpen, their_r50, their_targets
from model.accelerate import accelerate
from model.build import build_detector
from model.detector import Detector
from model.structures import Batch
from model.weights import from_torchvision
from workers.training.graphs import GraphedGradients, own_stream


def _work(scale: Scale, images: int) -> Work:
    return Work("r50-fpn", images, scale.objects, scale.canvas)


class Pair:
    """Our step and torchvision's, with the same first weights, images and objects.

    The peer runs as its users run it, under autocast in bf16 with a fused optimiser, and with
    channels-last weights too. `masks` counts the RoIs that its mask head saw.
    """

    def __init__(self, work: Work) -> None:
        self.batch = batch_of(work).to("cuda")
        peer = their_r50(work.canvas).train()
        detector = build_detector(work.model)
        with torch.no_grad():
            share_weights(detector, peer)
        detector = detector.to("cuda").train()
        accelerate(detector)
        self.ours = WorkerStep(detector, work.precision)
        self.floats = [image.float().contiguous() / 255 for image in self.batch.images]
        self.targets = their_targets(self.batch)
        self.masks: list[int] = []
        self.peer = peer.to("cuda")
        self.peer.roi_heads.mask_head.register_forward_pre_hook(
            lambda _, inputs: self.masks.append(len(inputs[0]))
        )

    def our_step(self) -> None:
        self.ours(self.batch)

    def their_step(self, channels_last: bool) -> Callable[[], None]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.peer.to(memory_format=layout)
        return make_step(
            self.peer,
            lambda: torch.stack(list(self.peer(self.floats, self.targets).values())).sum(),
            True,
        )


def throughput(scale: Scale) -> Iterator[Probe]:
    """Training in bf16 at each number of images a step, ours and the peer's in turns."""
    for images in scale.images:
        yield Probe(f"{images} images", lambda images=images: _compared(scale, images))


def _compared(scale: Scale, images: int) -> JsonValue:
    pair, per_burst = Pair(_work(scale, images)), max(2, min(10, 48 // images))
    # the layout of a shared peer changes between the two measurements
    first = bursts_of({"ours": pair.our_step, "peer": pair.their_step(False)}, scale, per_burst)
    memory = {"ours": _peak_gib(pair.our_step), "peer": _peak_gib(pair.their_step(False))}
    last = bursts_of({"peer": pair.their_step(True)}, scale, per_burst)["peer"]
    ours, peer = first["ours"], first["peer"]
    best = min(peer.ms, last.ms)
    return {
        "ours_images_per_s": round(1e3 * images / ours.ms, 1),
        "peer_images_per_s": round(1e3 * images / best, 1),
        "ratio": round(best / ours.ms, 3),
        "ours": ours.told(),
        "peer": peer.told(),
        "peer_channels_last": last.told(),
        "peak_gib": memory,
        "peer_masks_a_step": pair.masks[-1],
        "objects": scale.objects,
    }


def _peak_gib(step: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def settings(scale: Scale) -> Iterator[Probe]:
    """What a choice costs at the usual number of images: precision, cuDNN's search, objects."""
    work = _work(scale, scale.usual_images)
    yield Probe("as trained", lambda: _ours(scale, work))
    yield Probe("torch's operations alone", lambda: _ours(scale, work, ours=False))
    yield Probe("cudnn.benchmark", lambda: _searched(scale, work))
    yield Probe("fp32 with TF32", lambda: _ours(scale, replace(work, precision="fp32")))
    yield Probe("128 objects", lambda: _ours(scale, replace(work, objects=128)))
    for name in ("tiny", "r50-c4", "r50-fpn-keypoint", "x101-64x4d-fpn"):
        smaller = replace(work, preset=name, images=min(2, work.images))
        yield Probe(f"{name}, {smaller.images} images", lambda w=smaller: _ours(scale, w))


def _ours(scale: Scale, work: Work, ours: bool = True) -> JsonValue:
    step, batch = WorkerStep(detector_of(work.model, "cuda", ours), work.precision), batch_of(work)
    there = batch.to("cuda")
    found = bursts_of({"ours": lambda: step(there)}, scale)["ours"]
    return {**found.told(), "images_per_s": round(1e3 * work.images / found.ms, 1)}


def _searched(scale: Scale, work: Work) -> JsonValue:
    """Both sides with cuDNN's search for the fastest algorithm."""
    torch.backends.cudnn.benchmark = True
    try:
        pair = Pair(work)
        return timed({"ours": pair.our_step, "peer": pair.their_step(True)}, scale)
    finally:
        torch.backends.cudnn.benchmark = False


def prediction(scale: Scale) -> Iterator[Probe]:
    """Detections of the same weights on the same images, then pasting and encoding the masks."""
    images = scale.usual_images
    work = Work("r50-fpn-torchvision", images, 0, scale.canvas)
    batch = batch_of(work)
    peer = their_peer(work, batch)
    detector = build_detector(work.model)
    detector.load_state_dict(from_torchvision(peer.state_dict()), strict=True)
    detector, peer, there = detector.to("cuda").eval(), peer.to("cuda"), batch.to("cuda")
    accelerate(detector)
    for precision in ("fp32", "bf16"):
        yield Probe(
            precision, lambda p=precision: _predicted(scale, detector, peer, there, p == "bf16")
        )
    yield Probe("pasting and encoding on the host", lambda: _encoded(work, detector, there))
    yield Probe("image of a device", lambda: _one_image(detector, there))


def their_peer(work: Work, batch: Batch) -> nn.Module:
    """Torchvision's detector in evaluation, with as many detections as a trained one has."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    peer: nn.Module = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=min(work.canvas), max_size=max(work.canvas)
    ).eval()
    sharpen(peer, batch.images[0])
    return peer


def _predicted(
    scale: Scale, detector: Detector, peer: nn.Module, batch: Batch, bf16: bool
) -> JsonValue:
    floats = [image.float().contiguous() / 255 for image in batch.images]

    @torch.no_grad()
    def theirs() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            peer(floats)

    def ours() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return detector.predict(batch).valid

    kept = int(ours().sum())
    found = bursts_of({"ours": ours, "peer": theirs}, scale, 3)
    ratio = round(found["peer"].ms / found["ours"].ms, 3)
    told: dict[str, JsonValue] = {n: t.told() for n, t in found.items()}
    return {**told, "ratio": ratio, "detections": kept, "images": len(batch)}


def _encoded(work: Work, detector: Detector, batch: Batch) -> JsonValue:
    from workers.training.results import coco_results

    found = detector.predict(batch)
    torch.cuda.synchronize()  # predicting does not wait for the device
    start = time.perf_counter()
    coco_results(work.model, found, list(range(1, work.model.num_classes + 1)))
    seconds = time.perf_counter() - start
    return {"ms_an_image": round(1e3 * seconds / len(batch), 2), "masks": int(found.valid.sum())}


def _one_image(detector: Detector, batch: Batch) -> JsonValue:
    """An image of another size, which has to be resized on the device."""
    found = detector.predict_image(batch.images[0, :, ::2, : batch.images.shape[3] // 2])
    return {name: list(value.shape) for name, value in found.items()}


def graphs(scale: Scale) -> Iterator[Probe]:
    """Training as with `loop.cuda_graphs`, beside the same steps one launch after another."""
    tiny = replace(_work(scale, 2), preset="tiny")
    for work in (tiny, *(_work(scale, images) for images in scale.images)):
        yield Probe(f"{work.preset}, {work.images} images", lambda w=work: _by_graphs(scale, w))


def _eager(scale: Scale, work: Work, batch: Batch, per_burst: int) -> Timing:
    # a function of its own, so that its weights and gradients are gone when the graphs begin
    step = WorkerStep(detector_of(work.model, "cuda"), work.precision)
    return bursts_of({"step": lambda: step(batch)}, scale, per_burst)["step"]


def _by_graphs(scale: Scale, work: Work) -> JsonValue:
    batch = batch_of(work).to("cuda")
    per_burst = max(2, min(10, 48 // work.images))
    eager = _eager(scale, work, batch, per_burst)
    step = WorkerStep(detector_of(work.model, "cuda"), work.precision, by_graphs=True)
    with own_stream(step.loop, step.world.device):
        for _ in range(4):  # two eager ones, the capture, a replay
            step(batch)
        graphs = bursts_of({"graphs": lambda: step(batch)}, scale, per_burst)["graphs"]
        memory = torch.cuda.max_memory_reserved() / 2**30
        captured = isinstance(step.accumulate, GraphedGradients) and step.accumulate.num_graphs > 0
        step.accumulate.forget()
    return {
        "captured": captured,
        "eager": eager.told(),
        "graphs": graphs.told(),
        "images_per_s": round(1e3 * work.images / graphs.ms, 1),
        "ratio": round(eager.ms / graphs.ms, 3),
        "reserved_gib": round(memory, 2),
    }


def compiled(scale: Scale) -> Iterator[Probe]:
    """`loop.compile`, as the workers compile: the seconds that it takes, and what it gains."""

    def step_of(work: Work) -> JsonValue:
        plain, fast = (WorkerStep(detector_of(work.model, "cuda"), "bf16") for _ in range(2))
        there = batch_of(work).to("cuda")
        fast.sums.compile(dynamic=False)
        start = time.perf_counter()
        fast(there)
        torch.cuda.synchronize()
        first = round(time.perf_counter() - start, 1)
        found = timed({"eager": lambda: plain(there), "compiled": lambda: fast(there)}, scale)
        assert isinstance(found, dict)
        return {"first_step_s": first, **found}

    # Inductor takes minutes on the CPUs of the tests
    if not scale.dry:
        for work in (Work("tiny", 8, 8, (256, 256)), _work(scale, scale.usual_images)):
            yield Probe(work.preset, lambda w=work: step_of(w))
