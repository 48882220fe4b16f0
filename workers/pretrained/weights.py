"""Initial weights as a plain state dict, by torchvision's names or from a file.

No code of a file ever runs: only arrays are unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from contract.attempt import LAST_WEIGHTS
from contract.files import file_sha256
from contract.model import (
    VGG16,
    Backbone,
    FileWeights,
    NoWeights,
    ResNet,
    ResNeXt,
    TorchvisionWeights,
    Weights,
)
from workers.pretrained.zoo import read_zoo_pickle


def initial_weights(
    weights: Weights, backbone: Backbone
) -> tuple[Mapping[str, Tensor], str] | None:
    """The state dict and its layout for `model.weights.load_initial`.

    None where parameters start at random. Raises ValueError if a file is missing, damaged or no
    state dict, RuntimeError if a download fails.
    """
    match weights:
        case NoWeights():
            return None
        case TorchvisionWeights():
            return _read(torchvision_file(weights.name, backbone)), "backbone"
        case FileWeights():
            return _read(_local(weights.path)), weights.layout
        case _:
            assert_never(weights)


def fresh_heads(weights: Weights) -> bool:
    """Whether the layers that depend on classes start anew."""
    return isinstance(weights, FileWeights) and weights.heads == "fresh"


def weights_source(weights: Weights) -> str:
    """The field that names the initial weights, with its value: a message about them begins so."""
    match weights:
        case NoWeights():
            return "model.weights"
        case TorchvisionWeights():
            return f"model.weights.name {weights.name}"
        case FileWeights():
            return f"model.weights.path {weights.path}"
        case _:
            assert_never(weights)


def torchvision_url(name: str, backbone: Backbone) -> str:
    """Where torchvision keeps the checkpoint `name` of a backbone.

    Raises ValueError if it has none of that name.
    """
    from torchvision import models

    match backbone:
        case ResNet():
            model = f"resnet{backbone.depth}"
        case ResNeXt():
            model = f"resnext{backbone.variant.replace('-', '_')}"
        case VGG16():
            model = "vgg16"
        case _:
            assert_never(backbone)
    # torchvision's own list of releases: a new one needs no change here
    known = models.get_model_weights(model)
    if name not in known.__members__:
        raise ValueError(
            f"weights.name: torchvision has no {name!r} of {model}; "
            f"it has {', '.join(known.__members__)}"
        )
    return str(known[name].url)


def torchvision_file(name: str, backbone: Backbone) -> Path:
    """The checkpoint in torch hub's cache, downloaded if it is not there.

    Raises ValueError if it is not the file that torchvision released, RuntimeError if it cannot be
    downloaded.
    """
    url = torchvision_url(name, backbone)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                url, str(path), hash_prefix=_hash_prefix(url), progress=False
            )
        # nodes of a cluster often have no way out: the remedy says where to put the file
        except OSError as error:
            raise RuntimeError(
                f"{url} cannot be downloaded ({error}); fetch it elsewhere and put it at {path}"
            ) from error
    # also a file that was there: an interrupted copy may have left half of it
    check_released(path, url)
    return path


def check_released(path: Path, url: str) -> None:
    """Raises ValueError if the file's hash is not the one in which the name of `url` ends."""
    actual, expected = file_sha256(path), _hash_prefix(url)
    if not actual.startswith(expected):
        raise ValueError(
            f"{path} is damaged: its SHA-256 begins with {actual[:8]}, its name says {expected}; "
            f"delete it, or fetch {url} again and put it there"
        )


def _hash_prefix(url: str) -> str:
    """A released file's name ends in the start of its SHA-256: resnet18-f37072fd.pth."""
    return url.rsplit("-", 1)[-1].removesuffix(".pth")


def _local(path: str) -> Path:
    """Raises ValueError if no local file is there."""
    if "://" in path:
        raise ValueError(
            f"model.weights.path {path}: only local files are read; "
            "fetch it and give the file's path"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        own = file / LAST_WEIGHTS
        which = f", {own} with layout maskray" if own.is_file() else ""
        raise ValueError(f"model.weights.path {path}: is a folder; give the file in it{which}")
    if not file.exists():
        raise ValueError(f"model.weights.path {path}: there is no such file")
    return file


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".pkl":
        state: Mapping[str, Tensor] = read_zoo_pickle(path)
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _read_torch(path)
    # here, where the file has a name: in training they would look like a divergence
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(
                f"{path}: {name!r} holds values that are not finite; "
                "give weights from before it diverged"
            )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); copy or save it again"
        ) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    """A state dict, bare or as trainers wrap it.

    Wrapped is one in the entry "model" or "state_dict", or with DDP's prefix `module.`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that it cannot read
        raise ValueError(
            f"{path} is no state dict of plain tensors ({type(error).__name__}); "
            "save one with torch.save(model.state_dict()) or as .safetensors"
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds {type(state).__name__}, not a state dict; names to tensors are expected"
        )
    # a nested dict would otherwise fail far away, as missing parameters
    strange = [
        name
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ValueError(
            f"{path} is not a state dict: its entry {strange[0]!r} is not a name with a tensor; "
            "save the model's state_dict() alone"
        )
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state
