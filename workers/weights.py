"""Initial weights: from torchvision's names or a file to a plain state dict. Nothing but arrays is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from model.config import VGG16, Backbone, FileWeights, NoWeights, ResNet, ResNeXt, TorchvisionWeights, Weights
from workers.zoo import read_zoo_pickle


def initial_weights(weights: Weights, backbone: Backbone) -> tuple[Mapping[str, Tensor], str] | None:
    """The state dict and its layout for `model.weights.load_initial`; None where parameters start at random.

    Raises ValueError if a file is missing or is no state dict, RuntimeError if a download fails.
    """
    match weights:
        case NoWeights():
            return None
        case TorchvisionWeights():
            return _read(torchvision_file(weights.name, backbone)), "backbone"
        case FileWeights():
            return _read(Path(weights.path)), weights.layout
        case _:
            assert_never(weights)


def torchvision_url(name: str, backbone: Backbone) -> str:
    """Where torchvision keeps the checkpoint `name` of a backbone. Raises ValueError if it has none of that name."""
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
    known = models.get_model_weights(model)
    if name not in known.__members__:
        raise ValueError(f"weights.name: torchvision has no {name!r} of {model}; it has {', '.join(known.__members__)}")
    return str(known[name].url)


def torchvision_file(name: str, backbone: Backbone) -> Path:
    """The checkpoint in torch hub's cache, downloaded if it is not there."""
    url = torchvision_url(name, backbone)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # the file's own name ends in the start of its hash, which is checked
            hash_prefix = path.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=False)
        except OSError as error:
            raise RuntimeError(
                f"{url} cannot be downloaded ({error}); fetch it elsewhere and put it at {path}"
            ) from error
    return path


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.exists():
        raise ValueError(f"weights.path: {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: Mapping[str, Tensor] = load_file(path)
        return tensors
    if path.suffix == ".pkl":
        return read_zoo_pickle(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is no state dict of plain tensors ({type(error).__name__}); "
            "save one with torch.save(model.state_dict()) or as .safetensors"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict: names to tensors are expected")
    return state
