"""A detector that is trained, with the names of its classes: from a run, or from anybody's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor

from contract.attempt import CATEGORIES_FILE, CONFIG_FILE
from contract.files import Files, uri_join
from contract.machine.folders import scratch
from contract.model import FileWeights, FrozenBatchNorm, ModelConfig, ResNet
from contract.presets import preset
from contract.recipe import RunConfig, apply_overrides, parse_run
from contract.record import Message
from contract.run_file import read_run_file
from contract.yaml import parse_yaml
from model.accelerate import accelerate
from model.build import build_detector
from model.detector import Detector
from model.weights import layout_of, load_initial
from pipelines.shards.dataset import open_dataset
from workers.inference.files import WEIGHTS, Which, check_written
from workers.pretrained.weights import initial_weights


class Category(Message):
    """A class: its COCO id and name, the names of its keypoints."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()


_CATEGORIES = TypeAdapter(tuple[Category, ...])


@dataclass(frozen=True)
class Trained:
    """A detector ready to predict. Label k of it is `categories[k]`; source: in words."""

    model: ModelConfig
    detector: Detector
    categories: tuple[Category, ...]
    source: str

    def category(self, label: int) -> Category:
        """The class of a label of `detector.predict_image`, which counts as the class logits do."""
        return self.categories[label - int(self.model.background == "first")]


def load_trained(
    source: str | Path,
    which: Which = "last",
    config: Path | None = None,
    device: torch.device | str = "cpu",
    accelerated: bool = True,
) -> Trained:
    """The detector of a run's folder, of a run's file of weights, or of anybody's file.

    which: of a run's two files. config: a run file that says what the weights of a bare file are;
    without it a file of torchvision or detectron2 has the preset of its release. accelerated: with
    our kernels, of which a program of torch.export knows nothing. Raises ValueError of one line.
    """
    storage, name = _run_of(str(source), which)
    if storage is not None and config is None:
        return trained_run(storage, name, device, accelerated)
    if storage is not None and not Path(source).expanduser().is_file():
        raise ValueError(f"{source}: its run says what its weights are; leave --config out")
    path = str(Path(source).expanduser())
    weights = initial_weights(FileWeights(path=path), ResNet())
    assert weights is not None
    state, layout = weights[0], _detector_layout(weights[0], path)
    model, words = _described(config, path, state, layout)
    detector = build_detector(model).to(device)
    try:
        load_initial(detector, state, layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if accelerated:
        accelerate(detector)
    categories = _coco_categories(model) or _numbered(model)
    return Trained(model, detector.eval(), categories, f"{path}, {words}")


def trained_run(
    storage: Files, weights: str, device: torch.device | str = "cpu", accelerated: bool = True
) -> Trained:
    """The detector of a run's folder with the weights of that name in it."""
    run = run_config(storage)
    check_written(storage, weights)
    detector = build_detector(run.model, run.seed).to(device)
    # safetensors reads local files alone; behind a URI this is a copy
    with scratch("weights") as folder:
        file = storage.fetch(weights, Path(folder))
        read = initial_weights(FileWeights(path=str(file), layout="maskray"), run.model.backbone)
        assert read is not None
        load_initial(detector, *read)
    if accelerated:
        accelerate(detector)
    return Trained(
        run.model, detector.eval(), _categories(storage, run), uri_join(storage.uri, weights)
    )


def run_config(storage: Files) -> RunConfig:
    """The configuration of a run that has begun. Raises ValueError if there is none."""
    try:
        text = storage.read(CONFIG_FILE).decode()
    except FileNotFoundError:
        raise ValueError(f"{storage.uri}: no run there ({CONFIG_FILE} is missing)") from None
    return parse_run(parse_yaml(text, storage.uri), storage.uri)


def _run_of(source: str, which: Which) -> tuple[Files | None, str]:
    """The run whose folder, or file of weights, `source` is; None for a file of no run."""
    path = Path(source).expanduser()
    if "://" in source or path.is_dir():
        return Files(source), WEIGHTS[which]
    if not path.exists():
        raise ValueError(
            f"{source}: is neither the folder of a run, nor a file of weights, nor a trial "
            "(STUDY:KEY; see maskray status STUDY)"
        )
    if which == "best":
        raise ValueError(
            f"{source}: is one file, and --weights chooses one in a run's folder; leave it out"
        )
    folder = path.absolute().parent.parent
    own = (folder / CONFIG_FILE).is_file() and path.name in {Path(n).name for n in WEIGHTS.values()}
    return (Files(str(folder)) if own else None), str(path.absolute().relative_to(folder))


def _detector_layout(state: Mapping[str, Tensor], path: str) -> str:
    layout = layout_of(state)
    if layout in ("", "backbone"):
        what = "a backbone alone" if layout else "no detector's"
        raise ValueError(
            f"{path}: its names are {what}; give a detector of maskray, torchvision or detectron2"
        )
    return layout


def _described(
    config: Path | None, path: str, state: Mapping[str, Tensor], layout: str
) -> tuple[ModelConfig, str]:
    """What the weights of a bare file are, and in words how one knows."""
    if config is not None:
        unset: dict[str, JsonValue] = {"data.train": "unset", "data.val": "unset"}
        data = apply_overrides(read_run_file(config), unset)
        return parse_run(data, str(config)).model, f"as {config} says"
    if layout == "maskray":
        raise ValueError(
            f"{path}: a file of maskray's own says no architecture; give the folder of its run, or "
            "--config RUN.yaml"
        )
    task = "-keypoint" if any("keypoint_head" in name for name in state) else ""
    kind = "c4" if any(name.startswith("roi_heads.res5.") for name in state) else "fpn"
    cfg = preset(f"r50-{kind}{task}-{layout}")
    outputs = next(len(value) for name, value in state.items() if name.endswith("cls_score.weight"))
    changes: dict[str, object] = {"num_classes": outputs - 1}
    eps = ""
    if re.search(r"_coco-[0-9a-f]{8}\.pth$", path):  # torchvision runs its releases so
        changes["backbone"] = ResNet(norm=FrozenBatchNorm(eps=0))
        eps = ", norm.eps 0 as of a release"
    return cfg.model_copy(update=changes), f"as preset r50-{kind}{task}-{layout}{eps}"


def _categories(storage: Files, run: RunConfig) -> tuple[Category, ...]:
    """Those of the run's own file; a run of an older version asks its data."""
    try:
        return _CATEGORIES.validate_json(storage.read(CATEGORIES_FILE))
    except FileNotFoundError:
        pass
    try:
        val = open_dataset(run.data.val, cache_gib=run.data.cache_gib)
        train = open_dataset(run.data.train, cache_gib=run.data.cache_gib)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{storage.uri}: the run has no {CATEGORIES_FILE}, since an older version made it, and "
            f"its data cannot say what the classes are: {error}"
        ) from error
    view = val.aligned_with(train).for_evaluation(run.data)
    return tuple(Category(id=c.id, name=c.name, keypoints=c.keypoints) for c in view.categories)


def _coco_categories(model: ModelConfig) -> tuple[Category, ...]:
    """COCO's, where the number of classes is that of a release; else none."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's sparse ids
    every = tuple(Category(id=number, name=name) for number, name in enumerate(names) if number)
    match model.num_classes:
        case 90:  # torchvision counts the ids that COCO leaves out, too
            return every
        case 80:
            return tuple(category for category in every if category.name != "N/A")
        case 1 if model.keypoints.kind == "keypoints":
            return every[:1]
        case _:
            return ()


def _numbered(model: ModelConfig) -> tuple[Category, ...]:
    return tuple(Category(id=k, name=f"class {k}") for k in range(1, model.num_classes + 1))
