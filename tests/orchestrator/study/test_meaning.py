"""An edit of the sources is a new trial for the arms that reach it, and for no other arm."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

import pytest

from contract.presets import run_preset
from contract.recipe import RunConfig, apply_overrides, parse_run
from orchestrator.study.code_package import installed
from orchestrator.study.meaning.doubts import KNOWN, doubtful
from orchestrator.study.meaning.reach import Meaning, own_meaning


def arm(preset: str = "tiny", **overrides: Any) -> RunConfig:
    places = {"data.train": "t", "data.val": "v", **overrides}
    return parse_run(apply_overrides(run_preset(preset), places), "tests")


ARMS = {
    "sigmoid": arm(),
    "softmax": arm(**{"model.mask.loss.kind": "softmax"}),
    "pool": arm(**{"model.roi.kind": "pool"}),
    "c4": arm("r50-c4"),
}
FILES = {name: content for name, content in installed().items() if "orchestrator" not in name}


def edited(edits: Mapping[str, tuple[str, str]]) -> dict[str, bytes]:
    """Our sources with a text in place of another one in each of these files, or a new file."""
    files = dict(FILES)
    for name, (old, new) in edits.items():
        text = files[name].decode() if name in files else old
        assert text.count(old) == 1, (name, old)
        files[name] = text.replace(old, new).encode()
    return files


def changed(files: Mapping[str, bytes]) -> set[str]:
    """The arms that reach other code in `files` than in ours."""
    before, after = own_meaning(), Meaning(files)
    return {name for name, run in ARMS.items() if before.of(run).sha256 != after.of(run).sha256}


def test_comments_and_lines_do_not_count() -> None:
    files = {
        name: ast.unparse(ast.parse(content)).encode() if name.endswith(".py") else content
        for name, content in FILES.items()
    }
    assert files != FILES
    assert changed(files) == set()


def test_words_and_what_no_trial_reaches_do_not_count() -> None:
    files = edited(
        {
            "model/losses.py": (
                "def softmax_mask_loss(",
                "def nobody_calls_this(x):\n    return x\n\n\ndef softmax_mask_loss(",
            ),
            "workers/predict.py": ("import argparse\n", "import argparse\nimport model.gpu\n"),
            "contract/presets.py": ("def preset(", "SPARE = 1\n\n\ndef preset("),
            "contract/model.py": (
                "class VGG16(Record):",
                "class Spare(Record): ...\n\n\nclass VGG16(Record):",
            ),
            "model/build.py": (
                "        case config.VGG16():\n            return VGGMaps(",
                "        case config.VGG16():\n            return VGGMaps(1 + ",
            ),
        }
    )
    files["model/box_losses.py"] = b'"""Nobody imports this."""\nprint("anything")\n'
    detector = ast.parse(files["model/detector.py"])
    detector.body[0] = ast.Expr(ast.Constant("Other words."))
    files["model/detector.py"] = ast.unparse(detector).encode()
    assert changed(files) == set()


def test_an_edit_counts_for_the_arms_that_reach_it() -> None:
    files = edited(
        {
            "model/losses.py": (
                "def softmax_mask_loss(",
                "@torch.no_grad()\ndef softmax_mask_loss(",
            ),
            "model/build.py": (
                "RoIOperation(Pool(), side, strides)",
                "RoIOperation(Pool(), side, strides[:1])",
            ),
        }
    )
    assert changed(files) == {"softmax", "pool"}
    halves = "res5 = build_res5(cfg.backbone, halves="  # below `if isinstance(cfg.layout, C4)`
    one_mask = "return 1 if self.class_agnostic else num_classes"  # a method of SigmoidMask
    files = edited(
        {
            "model/build.py": (halves, f"{halves}not "),
            "contract/model.py": (one_mask, f"{one_mask} + 0"),
        }
    )
    assert changed(files) == {"c4", "sigmoid", "pool"}


@pytest.mark.parametrize(
    "edits",
    [
        {"model/cpu/native.c": ("ROWS = 6", "ROWS = 3")},
        {"model/detector.py": ("    @torch.no_grad()\n", "")},
        {  # a module that does something when it is imported
            "model/branches/spare.py": ("", "import torch\ntorch.set_num_threads(1)\n"),
            "model/build.py": (
                "from model.branches.box import",
                "import model.branches.spare\nfrom model.branches.box import",
            ),
        },
        {  # a function that a decorator enters somewhere
            "model/losses.py": (
                "import torch\n",
                "import torch\n@torch.compiler.disable\ndef spare(): ...\n",
            )
        },
        {"model/losses.py": ("import torch.nn.functional as F", "import torch.nn.grad as F")},
        {"pipelines/load/order.py": ("", "this is no Python")},
    ],
    ids=["C", "detector", "import", "decorator", "name", "broken"],
)
def test_what_all_arms_reach_counts_for_all(edits: dict[str, tuple[str, str]]) -> None:
    if edits.get("pipelines/load/order.py"):
        files = FILES | {"pipelines/load/order.py": b"this is no Python"}
    else:
        files = edited(edits)
    assert changed(files) == set(ARMS)


def test_every_doubtful_statement_of_ours_was_looked_at() -> None:
    """Else everything counts for every arm: `python -m orchestrator.study.meaning.relist`."""
    meaning = own_meaning()
    listed = json.loads(KNOWN.read_text("utf-8"))
    for module, hashes in doubtful(meaning.sources, iter(sorted(meaning.imported))).items():
        assert set(hashes) <= set(listed[module]), module
    assert len({meaning.of(run).sha256 for run in ARMS.values()}) == len(ARMS)
