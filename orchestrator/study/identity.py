"""Which trials are the same trial: a hash of everything that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contract.files import Files, split
from contract.model import (
    VGG16,
    BatchNorm,
    FileWeights,
    FixedProposals,
    ModelConfig,
    NoWeights,
    ResNet,
    ResNeXt,
    TorchvisionWeights,
)
from contract.recipe import RunConfig, training_record
from contract.record import nearest
from orchestrator.study.meaning.reach import Reached

# torchvision's ImageNet checkpoints: (backbone, name) -> (file, recipe). A file's name holds the
# start of its SHA-256, so the name is enough: nothing is downloaded to plan a study.
_OLD, _NEW = "original", "2021 (long, with mixup and EMA)"
TORCHVISION_CHECKPOINTS: dict[tuple[str, str], tuple[str, str]] = {
    ("resnet18", "IMAGENET1K_V1"): ("resnet18-f37072fd.pth", _OLD),
    ("resnet34", "IMAGENET1K_V1"): ("resnet34-b627a593.pth", _OLD),
    ("resnet50", "IMAGENET1K_V1"): ("resnet50-0676ba61.pth", _OLD),
    ("resnet50", "IMAGENET1K_V2"): ("resnet50-11ad3fa6.pth", _NEW),
    ("resnet101", "IMAGENET1K_V1"): ("resnet101-63fe2227.pth", _OLD),
    ("resnet101", "IMAGENET1K_V2"): ("resnet101-cd907fc2.pth", _NEW),
    ("resnext50_32x4d", "IMAGENET1K_V1"): ("resnext50_32x4d-7cdf4587.pth", _OLD),
    ("resnext50_32x4d", "IMAGENET1K_V2"): ("resnext50_32x4d-1a0047aa.pth", _NEW),
    ("resnext101_32x8d", "IMAGENET1K_V1"): ("resnext101_32x8d-8ba56ff5.pth", _OLD),
    ("resnext101_32x8d", "IMAGENET1K_V2"): ("resnext101_32x8d-110c445d.pth", _NEW),
    ("resnext101_64x4d", "IMAGENET1K_V1"): ("resnext101_64x4d-173b62eb.pth", _NEW),
    ("vgg16", "IMAGENET1K_V1"): ("vgg16-397923af.pth", _OLD),
}

_CHUNK = 2**22  # bytes read at once: files of weights may be larger than what is free in memory


def backbone_name(model: ModelConfig) -> str:
    """torchvision's name of the configured backbone."""
    match model.backbone:
        case ResNet(depth=depth):
            return f"resnet{depth}"
        case ResNeXt(variant=variant):
            return "resnext" + variant.replace("-", "_", 1)
        case VGG16():
            return "vgg16"


def weights_recipe(model: ModelConfig) -> str:
    """How the initial weights were made; arms of one study should agree on it."""
    match model.weights:
        case NoWeights():
            return "none"
        case FileWeights(path=path, heads=heads):
            return f"file {Path(path).name}" + (", heads fresh" if heads == "fresh" else "")
        case TorchvisionWeights(name=name):
            return f"ImageNet, {_checkpoint(model, name)[1]} recipe"


def weights_identity(model: ModelConfig) -> str:
    """The initial weights as text that changes with their bytes.

    Raises ValueError if the file, or torchvision's checkpoint of that name, does not exist.
    """
    match model.weights:
        case NoWeights():
            return "none"
        case FileWeights(path=path, layout=layout, heads=heads):
            file = Path(path)
            if not file.is_file():
                raise ValueError(f"model.weights.path: {path}: there is no such file")
            fresh = ":fresh" if heads == "fresh" else ""
            return f"{layout}{fresh}:{_sha256(_chunks(file))}"
        case TorchvisionWeights(name=name):
            return _checkpoint(model, name)[0]


def proposals_identity(model: ModelConfig) -> str:
    """The hash of fixed proposals, or "end_to_end". Raises ValueError if the file is missing."""
    if not isinstance(model.proposals, FixedProposals):
        return "end_to_end"
    uri = model.proposals.uri
    try:
        return _sha256(_chunks_of_uri(uri))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.proposals.uri: {uri} cannot be read ({error}); "
            "write it with 'maskray proposals'"
        ) from None


def identity(
    run: RunConfig,
    *,
    manifests: tuple[str, str],
    weights: str,
    proposals: str,
    code: Reached,
    ranks: int,
) -> str:
    """SHA-256 of the run and of all bytes that it depends on, as 64 hex digits.

    manifests: hashes of the training and the validation manifest. code: what of the sources the
    run reaches. Places of files do not count, their bytes do. The number of ranks counts only under
    trained batch-norm, whose statistics are per rank.
    """
    # Another path to the same manifest is the same trial: the manifest's hash counts in its place.
    record = run.model_dump(mode="json", exclude={"data": {"train", "val"}})
    return _hash(run, record, list(manifests), (weights, proposals), code, ranks)


def training_identity(
    run: RunConfig, *, manifest: str, weights: str, proposals: str, code: Reached, ranks: int
) -> str:
    """As `identity`, of the training alone: what only evaluation reads does not count.

    manifest: of the training data. Runs that agree in it may share a training.
    """
    record = training_record(run)
    data = record["data"]
    assert isinstance(data, dict)
    del data["train"]
    return _hash(run, record, ["training", manifest], (weights, proposals), code, ranks)


def _hash(
    run: RunConfig,
    record: dict[str, Any],
    manifests: list[str],
    initial: tuple[str, str],
    code: Reached,
    ranks: int,
) -> str:
    # The hash of weights and proposals stands for their whole record: places do not count.
    record["model"] |= {"weights": initial[0], "proposals": initial[1]}
    everything = {
        "run": record,
        "manifests": manifests,
        "sources": code.sha256,
        "ranks": ranks if trains_batch_norm(run) else 0,
    }
    return hashlib.sha256(canonical(everything).encode()).hexdigest()


def trains_batch_norm(run: RunConfig) -> bool:
    """Whether each rank takes statistics of its own, so that the numbers depend on their number."""
    backbone = run.model.backbone
    return not isinstance(backbone, VGG16) and isinstance(backbone.norm, BatchNorm)


def canonical(data: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _checkpoint(model: ModelConfig, name: str) -> tuple[str, str]:
    backbone = backbone_name(model)
    if (backbone, name) not in TORCHVISION_CHECKPOINTS:
        known = [n for b, n in TORCHVISION_CHECKPOINTS if b == backbone]
        raise ValueError(
            f"model.weights.name: torchvision has no {name} weights of {backbone}; "
            f"{nearest(name, known)}"
        )
    return TORCHVISION_CHECKPOINTS[backbone, name]


def _sha256(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _chunks_of_uri(uri: str) -> Iterator[bytes]:
    folder, name = split(uri)
    with Files(folder).reading(name) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk
