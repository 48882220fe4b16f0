"""`python -m pipelines ...`: exit codes, one JSON object on stdout, one line for an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from contract.command import run_app
from pipelines.__main__ import app
from tests.pipelines.results import noisy_results
from tests.pipelines.tiny_coco import box_annotation, write_coco


@pytest.fixture
def call(capsys):
    def run(*words: Any) -> tuple[int, str, str]:
        status = run_app(app, [str(word) for word in words], "maskray")
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_from_drawing_to_a_score(call, tmp_path):
    folder = tmp_path / "d"
    status, out, _ = call(
        "data", "synth", folder, "--images", 10, "--size", 48, "--seed", 2, "--pack", "--json"
    )
    assert (status, out.count("\n")) == (0, 1)
    made = json.loads(out)
    assert (made["train"], made["val"], made["unchanged"]) == (8, 2, False)
    assert json.loads(
        call("data", "synth", folder, "--images", 10, "--size", 48, "--seed", 2, "--json")[1]
    )["unchanged"]

    status, out, _ = call("data", "verify", folder / "train", "--json")
    assert (status, json.loads(out)) == (0, {"ok": True, "shards": 1, "samples": 8, "errors": []})

    status, out, _ = call(
        "data",
        "show",
        folder / "train",
        "--out",
        tmp_path / "p.png",
        "--masks",
        "--samples",
        4,
        "--json",
    )
    shown = json.loads(out)
    assert (status, shown["images"], len(shown["drawn"]), len(shown["categories"])) == (0, 8, 4, 4)
    assert sum(c["annotations"] for c in shown["categories"]) == shown["annotations"]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (640, 640)

    status, out, _ = call("data", "export", folder / "val", "--out", tmp_path / "e.json", "--json")
    assert (status, json.loads(out)["images"]) == (0, 2)

    truth = folder / "annotations" / "instances_val.json"
    (tmp_path / "r.json").write_text(
        json.dumps(noisy_results(json.loads(truth.read_text()), "segm"))
    )
    scores = []
    for gt in (truth, tmp_path / "e.json", folder / "val"):
        status, out, _ = call(
            "eval", "--gt", gt, "--dt", tmp_path / "r.json", "--iou", "segm", "--json"
        )
        assert status == 0
        scores.append(json.loads(out))
    assert scores[0] == scores[1] == scores[2]
    assert list(scores[0]) == [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR100",
        "ARs",
        "ARm",
        "ARl",
    ]
    assert call("data", "stage", folder / "val", "--json")[0] == 0


def test_verify_names_damage_and_fails(call, shapes, tmp_path):
    copy = Path(shutil.copytree(shapes / "train", tmp_path / "copy"))
    (copy / "shard-00001.arrow").unlink()
    status, out, err = call("data", "verify", copy, "--json")
    verdict = json.loads(out)
    assert (status, verdict["ok"], err) == (1, False, "")
    assert [set(error) for error in verdict["errors"]] == [{"shard", "row", "error"}]
    assert verdict["errors"][0]["shard"] == "shard-00001.arrow"
    status, out, _ = call("data", "verify", copy)
    assert status == 1
    assert "shard-00001.arrow: missing" in out


@pytest.mark.parametrize(
    "words",
    [
        ("data", "verify", "/nowhere/at/all"),
        (
            "data",
            "pack",
            "--annotations",
            "/nowhere.json",
            "--images",
            ".",
            "--out",
            "/nowhere/out",
        ),
        ("data", "pack", "--images", "."),
        (
            "data",
            "pack",
            "--annotations",
            "a",
            "--images",
            ".",
            "--out",
            "o",
            "--on-error",
            "maybe",
        ),
        ("data", "synth", "/nowhere/out", "--images", "1"),
        ("eval", "--gt", "/nowhere.json", "--dt", "/nowhere.json"),
        ("eval", "--gt", "a", "--dt", "b", "--iou", "mask"),
        ("data", "frobnicate"),
    ],
)
def test_a_persons_error_is_one_line_and_exit_2(call, words):
    status, out, err = call(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    status, out, _ = call(*words, "--json")
    assert status == 2
    assert set(json.loads(out)) == {"error"}


def test_skipped_inputs_are_counted_and_listed(call, tmp_path):
    write_coco(tmp_path, [box_annotation(1), box_annotation(2, bbox=[1, 1, -5, 5])])
    words = (
        "data",
        "pack",
        "--annotations",
        tmp_path / "instances.json",
        "--images",
        tmp_path / "images",
    )
    assert call(*words, "--out", tmp_path / "out")[0] == 2
    status, out, _ = call(*words, "--out", tmp_path / "out", "--on-error", "skip", "--json")
    assert (status, json.loads(out)["skipped"], json.loads(out)["annotations"]) == (0, 1, 1)
    assert "listed in" in call(*words, "--out", tmp_path / "out", "--on-error", "skip")[1]


def test_the_module_runs_and_imports_no_torch_to_pack(tmp_path):
    write_coco(tmp_path, [box_annotation(1)])
    words = [
        "data",
        "pack",
        "--annotations",
        "instances.json",
        "--images",
        "images",
        "--out",
        "out",
        "--json",
    ]
    program = (
        "import sys; from pipelines.__main__ import app; from contract.command import run_app; "
        f"status = run_app(app, {words!r}, 'maskray'); assert 'torch' not in sys.modules; "
        "sys.exit(status)"
    )
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 1


def test_a_file_where_a_folder_should_be_is_told_apart(call, tmp_path):
    (tmp_path / "file").write_text("x")
    for words in (
        ("data", "synth", tmp_path / "file", "--images", 4),
        ("data", "synth", tmp_path / "new", "--seed", -1),
        ("data", "verify", tmp_path / "file"),
        ("data", "show", tmp_path / "file"),
    ):
        status, out, err = call(*words)
        assert (status, out, err.count("\n")) == (2, "", 1), (words, err)
    assert not (tmp_path / "new").exists()


def test_no_command_prints_the_help(call):
    status, out, err = call()
    assert (status, out) == (2, "")
    assert "Commands:" in err
    assert err.count("\n") > 3
