"""A new mask loss is three edits: its record, its `case` in the builder, its module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = '''class BrierMask(Record):
    """A toy: the squared error of each RoI's own mask, with a soft and a sharp inference."""

    inferences: ClassVar[tuple[str, ...]] = ("soft", "sharp")

    kind: Literal["brier"] = "brier"
    sharpened: bool = False

    def num_channels(self, num_classes: int) -> int:
        """One mask a class."""
        return num_classes


'''
CASE = """        case config.BrierMask():
            return BrierMasks(cfg.sharpened)
"""
MODULE = '''"""A toy mask loss."""

from model.branches.mask import sample_crops


class BrierMasks:
    def __init__(self, sharpened):
        self.sharpened = sharpened

    def logits(self, head, features, labels_R):
        return head.own(features, labels_R.clamp(max=2))

    def loss(self, logits, rois, object_boxes, crops, labels):
        boxes, crops = object_boxes[rois.image, rois.objects], crops[rois.image, rois.objects]
        inside = sample_crops(crops, boxes, rois.boxes_xyxy, logits.shape[-1]).float()
        return ((logits.sigmoid() - inside).square().mean(dim=(1, 2)) * rois.weight).sum()

    def probabilities(self, logits, labels_R):
        maps = {"soft": logits.sigmoid(), "sharp": (4 * logits).sigmoid()}
        return dict(reversed(maps.items())) if self.sharpened else maps
'''
STUDY_SIDE = """
from contract.metrics import all_kinds, check_metric, result_kinds
from contract.presets import preset
from orchestrator.results.planning.checkpoint_size import parameters
sigmoid = preset("r50-fpn")
toy = sigmoid.model_validate({**dict(sigmoid), "mask": {"kind": "mask", "loss": {"kind": "brier"}}})
assert {"segm-soft", "segm-sharp"} == set(result_kinds(toy)) - set(result_kinds(sigmoid))
assert {"segm-soft", "segm-sharp"} < set(all_kinds())
check_metric("segm-sharp/AP")
assert parameters(toy) == parameters(sigmoid)
"""
REACHED = """
from contract.presets import run_preset
from contract.recipe import apply_overrides, parse_run
from orchestrator.study.meaning.reach import own_meaning
for loss in LOSSES:
    places = {"data.train": "t", "data.val": "v", "model.mask.loss.kind": loss}
    run = parse_run(apply_overrides(run_preset("tiny"), places), "tests")
    reached = own_meaning().of(run)
    print(reached.sha256, ("model.branches.brier", "BrierMasks") in reached.places)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working tree with a toy mask loss, in three edits."""
    tree = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("contract", "model", "pipelines", "workers", "orchestrator", "tests/model"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("pyproject.toml", "tests/builders.py"):
        shutil.copy(ROOT / name, tree / name)
    edit(tree / "contract/model.py", "MaskLoss: TypeAlias = Annotated[", RECORD, before=True)
    edit(tree / "contract/model.py", "MaskLoss: TypeAlias = Annotated[", "BrierMask | ")
    edit(
        tree / "model/build.py",
        "            return SigmoidMasks(num_classes, cfg.class_agnostic)\n",
        CASE,
    )
    edit(
        tree / "model/build.py",
        "from model.branches.box import",
        "from model.branches.brier import BrierMasks\n",
        before=True,
    )
    (tree / "model/branches/brier.py").write_text(MODULE)
    return tree


def edit(path: Path, anchor: str, text: str, before: bool = False) -> None:
    """Writes `text` after the only `anchor` of the file, or before it."""
    source = path.read_text()
    assert source.count(anchor) == 1
    path.write_text(source.replace(anchor, text + anchor if before else anchor + text))


def run_in(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_contract_tests_exist_and_pass(tree: Path) -> None:
    """Two arms (the record, and its other value): in three layouts, and with each mask head."""
    pytest_only = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "brier")
    assert "14 passed" in run_in(tree, *pytest_only, "tests/model/test_arms.py")


def test_studies_and_reports_know_its_metrics_and_its_size(tree: Path) -> None:
    run_in(tree, "-c", STUDY_SIDE)


def test_the_results_of_the_other_arms_stay_valid(tree: Path) -> None:
    """What `sigmoid` and `softmax` reach has the hash that it has without the new arm."""
    ours = run_in(ROOT, "-c", f"LOSSES = ['sigmoid', 'softmax']{REACHED}").split()
    theirs = run_in(tree, "-c", f"LOSSES = ['sigmoid', 'softmax', 'brier']{REACHED}").split()
    assert theirs[:4] == ours == [ours[0], "False", ours[2], "False"]
    assert theirs[4] not in ours
    assert theirs[5] == "True"
