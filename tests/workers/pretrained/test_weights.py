"""Files of initial weights: what is read, and what one line refuses with file and remedy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from contract.attempt import LAST_WEIGHTS, Result
from contract.model import FileWeights, ModelConfig, ResNet, TorchvisionWeights
from contract.presets import preset
from pipelines.pack.pack import PackOptions, pack
from pipelines.pack.synth import synthesise
from tests.builders import tiny_run
from tests.workers.trials import go, spec_of
from workers.pretrained.weights import check_released, initial_weights
from workers.training.build import initial_detector

ONE = {"conv1.weight": torch.ones(2)}


def read(path: Path | str) -> dict[str, Tensor]:
    weights = initial_weights(FileWeights(path=str(path)), ResNet())
    assert weights is not None
    state, layout = weights
    assert layout == "backbone"
    return dict(state)


@pytest.mark.parametrize(
    "data",
    [
        ONE,
        {"model": ONE, "optimizer": {}},
        {"state_dict": ONE, "epoch": 3},
        {"module.conv1.weight": torch.ones(2)},
        {"state_dict": {"module.conv1.weight": torch.ones(2)}},
    ],
    ids=["bare", "model", "state_dict", "ddp", "ddp_in_state_dict"],
)
def test_the_usual_wrappings_of_a_state_dict_are_taken_off(tmp_path, data):
    torch.save(data, tmp_path / "w.pth")
    state = read(tmp_path / "w.pth")
    assert list(state) == ["conv1.weight"]
    assert torch.equal(state["conv1.weight"], torch.ones(2))


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(ONE, tmp_path / "w.safetensors")
    assert torch.equal(read("~/w.safetensors")["conv1.weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([1], "holds list, not a state dict"),
        (
            {3: torch.ones(1)},
            "its entry 3 is not a name with a tensor; save the model's state_dict",
        ),
        ({"net": ONE, "epoch": 3}, "its entry 'net' is not a name with a tensor"),
        (
            {"a": torch.ones(1), "b": torch.tensor([1.0, torch.nan])},
            "'b' holds values that are not finite",
        ),
        ({"a": torch.tensor([torch.inf])}, "'a' holds values that are not finite"),
    ],
)
def test_what_is_no_state_dict_of_finite_numbers_is_refused_in_one_line(tmp_path, data, reason):
    path = tmp_path / "w.pth"
    torch.save(data, path)
    assert reason in refusal(lambda: read(path), path)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not safetensors at all")
    assert "is damaged or no safetensors file" in refusal(lambda: read(path), path)
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "copy or save it again" in refusal(lambda: read(path), path)


def test_what_is_no_local_file_is_refused_in_one_line(tmp_path):
    assert "is a folder; give the file in it" in refusal(lambda: read(tmp_path), tmp_path)
    assert "there is no such file" in refusal(lambda: read(tmp_path / "w.pth"), tmp_path / "w.pth")
    url = "https://example.org/w.pth"
    assert "only local files are read; fetch it" in refusal(lambda: read(url), url)


def test_a_file_that_does_not_fit_is_named_with_its_own_names(tmp_path):
    path = tmp_path / "r18.pth"
    state = torchvision.models.resnet18().state_dict()
    torch.save({**state, "layer3.2.bn1.bias": torch.zeros(256)}, path)
    run = tiny_run(
        {
            "model.backbone": {"kind": "resnet", "depth": 18},
            "model.weights": {"kind": "file", "path": str(path)},
        }
    )
    line = refusal(lambda: initial_detector(run), f"model.weights.path {path}: ")
    assert "the file has 'layer3.2.bn1.bias', which the model has not" in line
    torch.save(state, path)
    loaded: dict[str, Any] = initial_detector(run).state_dict()
    assert torch.equal(loaded["backbone.conv1.weight"], state["conv1.weight"])


# --- torch hub's cache ---


@pytest.mark.parametrize("data", [b"", b"truncated", b"x" * 5000])
def test_another_file_under_the_released_ones_name_is_refused(tmp_path, monkeypatch, data):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    line = refusal(lambda: initial_weights(TorchvisionWeights(), ResNet(depth=18)), path)
    assert (
        f"its SHA-256 begins with {hashlib.sha256(data).hexdigest()[:8]}, its name says f37072fd"
        in line
    )
    assert (
        "delete it, or fetch https://download.pytorch.org/models/resnet18-f37072fd.pth again"
        in line
    )


def test_a_file_with_the_hash_of_its_name_is_the_released_one(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"released")
    check_released(
        tmp_path / "w.pth",
        f"https://example.org/w-{hashlib.sha256(b'released').hexdigest()[:8]}.pth",
    )


def refusal(action: Callable[[], object], where: Path | str) -> str:
    """The one line, which names `where`, with which `action` is refused."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        action()
    assert str(where) in str(caught.value)
    return str(caught.value)


# --- fine-tuning ---


def test_fresh_heads_load_all_but_what_depends_on_classes(tmp_path):
    file = {"kind": "file", "path": str(tmp_path / "w.safetensors"), "layout": "maskray"}
    released = initial_detector(tiny_run({"model.num_classes": 7}), "cpu").state_dict()
    save_file({name: value + 1 for name, value in released.items()}, tmp_path / "w.safetensors")
    own = tiny_run({"model.num_classes": 2, "model.weights": file})
    line = refusal(lambda: initial_detector(own), tmp_path / "w.safetensors")
    assert "set model.weights.heads to 'fresh'" in line
    lines: list[str] = []
    fresh = tiny_run({"model.num_classes": 2, "model.weights": {**file, "heads": "fresh"}})
    loaded = initial_detector(fresh, tell=lambda told: lines.append(told.line())).state_dict()
    drawn = initial_detector(tiny_run({"model.num_classes": 2})).state_dict()
    new = {name for name, value in loaded.items() if torch.equal(value, drawn[name])}
    layers = {name.rpartition(".")[0] for name in new}
    assert layers == {"box.class_logits", "box.offsets", "mask.head.logits"}
    assert all(torch.equal(loaded[n], released[n] + 1) for n in loaded.keys() - new)
    assert lines == [
        f"{len(loaded) - 6} tensors are loaded, 6 are fresh "
        "(box.class_logits, box.offsets, mask.head.logits)"
    ]


def test_fresh_heads_leave_out_a_task_that_one_side_lacks(tmp_path):
    file = {"kind": "file", "path": str(tmp_path / "w.safetensors"), "layout": "maskray"}
    file["heads"] = "fresh"
    save_file(dict(initial_detector(tiny_run()).state_dict()), tmp_path / "w.safetensors")
    boxes = tiny_run({"model.mask": {"kind": "none"}, "model.weights": file})
    lines: list[str] = []
    initial_detector(boxes, tell=lambda told: lines.append(told.line()))
    assert lines[0].endswith("; 8 of the file's are left out")
    boxes = tiny_run({"model.mask": {"kind": "none"}})
    save_file(dict(initial_detector(boxes).state_dict()), tmp_path / "w.safetensors")
    initial_detector(tiny_run({"model.weights": file}), tell=lambda t: lines.append(t.line()))
    assert "mask.head.deconv" in lines[1]


@pytest.mark.parametrize("name", ["r50-fpn-torchvision", "r50-fpn-detectron2"])
def test_fresh_heads_keep_a_released_detectors_conventions(name):
    file = FileWeights(path="w.pth", layout="detectron2", heads="fresh")
    if name.endswith("torchvision"):
        file = file.model_copy(update={"layout": "torchvision"})
    ModelConfig.model_validate({**dict(preset(name)), "num_classes": 3, "weights": file})
    with pytest.raises(ValueError, match="needs background"):
        ModelConfig.model_validate(
            {
                **dict(preset(name)),
                "weights": file,
                "background": "last" if name.endswith("torchvision") else "first",
            }
        )


def test_a_backbone_has_no_heads_to_draw():
    with pytest.raises(ValueError, match="heads 'fresh' has no effect with layout 'backbone'"):
        FileWeights(path="w.pth", heads="fresh")


@pytest.mark.slow
def test_fine_tuning_a_detector_beats_its_backbone_alone(tmp_path):
    """As a classifier's backbone does, the backbone alone knows no boxes; equal steps, 3 seeds."""
    synthesise(tmp_path, num_images=150, size=64, seed=0)
    for name in ("train", "val"):
        annotations = [tmp_path / "annotations" / f"instances_{name}.json"]
        pack(annotations, str(tmp_path / "images" / name), str(tmp_path / name), PackOptions())
    data = str(tmp_path / "train"), str(tmp_path / "val")

    def ap(name: str, categories: list[str], steps: int, **overrides: Any) -> float:
        run = tiny_run(
            {
                "model.num_classes": len(categories),
                "model.image.short_side_px": 64,
                "model.image.max_side_px": 64,
                "data.filter.categories": categories,
                "data.short_sides_px": [64],
                "data.max_side_px": 64,
                "loop.steps": steps,
                "loop.global_batch": 4,
                **{path.replace("__", "."): value for path, value in overrides.items()},
            },
            *data,
        )
        assert go(spec_of(tmp_path / name, run)).state == "done"
        result = Result.model_validate_json((tmp_path / name / "result.json").read_bytes())
        return result.metrics["bbox/AP"]

    ap("released", ["star", "ellipse"], 250)
    detector = tmp_path / "released" / LAST_WEIGHTS
    whole = {"kind": "file", "path": str(detector), "layout": "maskray", "heads": "fresh"}
    state = load_file(detector)
    backbone = {n.removeprefix("backbone."): v for n, v in state.items() if "backbone." in n}
    save_file(backbone, tmp_path / "backbone.safetensors")
    alone = {"kind": "file", "path": str(tmp_path / "backbone.safetensors")}
    own, gains = ["cross", "triangle"], []
    for seed in range(3):
        tuned = ap(f"tuned-{seed}", own, 40, seed=seed, model__weights=whole)
        print(f"seed {seed}: AP {tuned:.4f} of the detector")
        backbone_alone = ap(f"alone-{seed}", own, 40, seed=seed, model__weights=alone)
        print(f"seed {seed}: AP {backbone_alone:.4f} of its backbone alone")
        gains.append(tuned - backbone_alone)
    assert min(gains) > 0, gains
