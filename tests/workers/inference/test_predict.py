"""`maskray predict`: what it writes is what the run itself found, and bad images cost no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn

from contract.recipe import RunConfig
from pipelines.pack.synth import synthesise
from pipelines.shards.dataset import open_dataset
from tests.workers.trials import go, run_of, spec_of
from workers.inference.trained import load_trained
from workers.predict import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, packed: tuple[str, str]) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert go(spec_of(folder, run_of(packed, loop__steps=2))).state == "done"
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `packed` has been packed from."""
    folder = tmp_path_factory.mktemp("images")
    synthesise(folder, num_images=20, size=64, seed=0)
    return folder


def results(out: Path, kind: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((out / "results" / f"{kind}.json").read_text())
    return loaded


def test_predictions_on_the_validation_files_are_those_of_the_run(tmp_path, trained, images):
    out, annotations = tmp_path / "out", images / "annotations" / "instances_val.json"
    files = str(images / "images" / "val")
    assert main([str(trained), files, "--out", str(out), "--annotations", str(annotations)]) == 0
    for kind in ("bbox", "segm"):
        own = json.loads((trained / f"artifacts/detections/{kind}.json").read_text())
        found = results(out, kind)
        # the run evaluates in batches, whose convolutions round differently
        assert len(found) == pytest.approx(len(own), rel=0.05)
        assert {r["image_id"] for r in found} == {r["image_id"] for r in own}
        best = max(found, key=lambda r: r["score"])
        assert best["score"] == pytest.approx(max(r["score"] for r in own), abs=1e-4)
    pictures = sorted((out / "pictures").glob("*.png"))
    assert [p.stem for p in pictures] == sorted(p.stem for p in Path(files).iterdir())
    with Image.open(pictures[0]) as first:
        assert first.size[0] > 64, "names do not fit on 64 pixels"


def test_a_bad_image_is_told_and_counted_and_costs_no_other(tmp_path, trained, images, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((images / "images" / "val").iterdir())[0]
    shutil.copy(good, folder)
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:200])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    out = tmp_path / "out"
    arguments = [str(trained), str(folder), "gone.jpg", str(good), "--out", str(out), "--json"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["images"] == 2
    assert {Path(bad["file"]).name for bad in answer["bad"]} == {"cut.jpg", "text.png", "gone.jpg"}
    assert said.err.count("not predicted") == 3
    names = {p.name for p in (out / "pictures").iterdir()}
    assert names == {f"{good.stem}.png", f"{good.stem}-2.png"}, "two folders, one name"
    described = json.loads((out / "results" / "images.json").read_text())
    assert {r["image_id"] for r in results(out, "bbox")} <= {i["id"] for i in described["images"]}
    assert main([str(trained), "gone.jpg", "--out", str(out)]) == 2
    assert "none of 1 image(s) could be predicted; gone.jpg: no such" in capsys.readouterr().err


def test_every_image_has_a_picture_and_an_earlier_call_is_no_input(
    tmp_path, trained, images, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    good = sorted((images / "images" / "val").iterdir())[0]
    for name in (f"1/{good.name}", f"2/{good.name}", f"3/{good.stem}-2{good.suffix}"):
        Path(name).parent.mkdir()
        shutil.copy(good, name)
    for _ in range(2):
        assert main([str(trained), ".", "--out", "out", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 3
    assert len(list(Path("out/pictures").iterdir())) == 3
    annotations = images / "annotations" / "instances_val.json"
    again = [str(trained), "1", "2", "--out", "out", "--annotations", str(annotations), "--json"]
    assert main(again) == 1, "two files cannot be one image"
    answer = json.loads(capsys.readouterr().out)
    assert (answer["images"], [bad["file"] for bad in answer["bad"]]) == (1, [f"2/{good.name}"])
    assert f"of --annotations, as 1/{good.name} is" in answer["bad"][0]["error"]


def test_category_ids_are_the_data_sets_after_the_filter(tmp_path, packed, images):
    overrides = {"data__filter__categories": ["triangle", "ellipse"], "model__num_classes": 2}
    run: RunConfig = run_of(packed, loop__steps=1, **overrides)
    assert go(spec_of(tmp_path / "run", run)).state == "done"
    val = open_dataset(packed[1]).for_evaluation(run.data)
    found = load_trained(tmp_path / "run").categories
    assert [(c.id, c.name) for c in found] == [(c.id, c.name) for c in val.categories]
    # a run of before there was such a file asks its data
    (tmp_path / "run/artifacts/categories.json").unlink()
    assert load_trained(tmp_path / "run").categories == found
    weights = tmp_path / "run/artifacts/weights-last.safetensors"
    assert load_trained(weights).categories == found, "a run's file knows its run"


def test_a_photo_is_turned_as_its_exif_block_says(tmp_path, trained, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), "white").save(tmp_path / "photo.jpg", exif=exif)
    arguments = [str(trained), str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "out")]
    for rule, width, turned in (("auto", 40, 1), ("ignore", 80, 0)):
        assert main([*arguments, "--exif", rule, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["turned"] == turned
        described = json.loads((tmp_path / "out/results/images.json").read_text())
        assert described["images"][0]["width"] == width


def test_a_file_of_torchvision_has_the_preset_and_the_classes_of_its_release(tmp_path):
    torch.manual_seed(0)
    state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(state, tmp_path / "maskrcnn.pth")
    trained = load_trained(tmp_path / "maskrcnn.pth")
    assert trained.model.num_classes == 90
    assert trained.category(18).name == "dog"
    assert trained.category(18).id == 18
    assert "as preset r50-fpn-torchvision" in trained.source


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("nowhere", "is neither the folder of a run, nor a file of weights, nor a trial"),
        (".", "no run there"),
        ("backbone.pth", "its names are a backbone alone"),
        ("ours.pth", "give the folder of its run, or --config RUN.yaml"),
        ("ours.pth --weights best", "is one file, and --weights chooses one in a run's folder"),
        (". --config run.yaml", "its run says what its weights are; leave --config out"),
    ],
)
def test_what_is_not_trained_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": torch.ones(1)}, "backbone.pth")
    torch.save({"box.class_logits.weight": torch.ones(1)}, "ours.pth")
    name, *options = arguments.split()
    assert main([name, "a.jpg", "--out", "out", *options]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
