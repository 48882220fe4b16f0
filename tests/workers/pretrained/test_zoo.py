"""The model zoo's pickles: arrays come out, code does not run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract.model import FileWeights, ResNet
from workers.pretrained.weights import initial_weights


def written(path: Path, value: Any) -> FileWeights:
    path.write_bytes(pickle.dumps(value))
    return FileWeights(path=str(path), layout="detectron2")


def test_arrays_are_read_under_their_names(tmp_path):
    weights = {
        "backbone.stem.conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "n": np.array(3),
    }
    file = written(
        tmp_path / "model_final_0.pkl", {"model": weights, "__author__": "Detectron2 Model Zoo"}
    )
    weights_read = initial_weights(file, ResNet())
    assert weights_read is not None
    state, layout = weights_read
    assert layout == "detectron2"
    assert {name: value.tolist() for name, value in state.items()} == {
        n: v.tolist() for n, v in weights.items()
    }
    assert state["backbone.stem.conv1.weight"].dtype == torch.float32


def test_a_file_of_an_older_numpy_is_read(tmp_path):
    path = tmp_path / "model_final_1.pkl"
    file = FileWeights(path=str(path), layout="detectron2")
    data = pickle.dumps({"model": {"w": np.ones(2, np.float32)}}, protocol=2)
    path.write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    weights = initial_weights(file, ResNet())
    assert weights is not None
    assert weights[0]["w"].tolist() == [1, 1]


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"model": {"w": Runs()}}, "only plain arrays are read"),
        ({"model": {"w": [1, 2]}}, "names to arrays under 'model'"),
        ([1], "names to arrays under 'model'"),
    ],
)
def test_what_is_not_arrays_is_refused_in_one_line(tmp_path, monkeypatch, value, reason):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "model.pkl", value)
    with pytest.raises(ValueError, match=reason) as caught:
        initial_weights(file, ResNet())
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_cut_file_is_refused(tmp_path):
    file = written(tmp_path / "model.pkl", {"model": {"w": np.ones(100)}})
    Path(file.path).write_bytes(Path(file.path).read_bytes()[:200])
    with pytest.raises(ValueError, match="no model-zoo file of plain arrays"):
        initial_weights(file, ResNet())
